/*
 * The functions of the CUDA driver that KvikIO looks up when it is loaded, for a machine without a
 * driver. Each reports an error, except for the one by which KvikIO recognises host memory.
 *
 *     cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 libcuda.c
 */

#define CUDA_ERROR_UNKNOWN 999

#define FAILS(name)                                                                                \
	int name(void);                                                                            \
	int name(void)                                                                             \
	{                                                                                          \
		return CUDA_ERROR_UNKNOWN;                                                         \
	}

FAILS(cuMemHostAlloc)
FAILS(cuMemFreeHost)
FAILS(cuMemHostRegister_v2)
FAILS(cuMemHostUnregister)
FAILS(cuMemcpyHtoDAsync_v2)
FAILS(cuMemcpyDtoHAsync_v2)
FAILS(cuMemcpyAsync)
FAILS(cuPointerGetAttribute)
FAILS(cuCtxCreate_v2)
FAILS(cuCtxDestroy_v2)
FAILS(cuCtxPushCurrent_v2)
FAILS(cuCtxPopCurrent_v2)
FAILS(cuCtxGetCurrent)
FAILS(cuCtxGetDevice)
FAILS(cuMemGetAddressRange_v2)
FAILS(cuGetErrorName)
FAILS(cuGetErrorString)
FAILS(cuDeviceGet)
FAILS(cuDeviceGetCount)
FAILS(cuDeviceGetAttribute)
FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuDevicePrimaryCtxRelease_v2)
FAILS(cuStreamSynchronize)
FAILS(cuStreamCreate)
FAILS(cuStreamDestroy_v2)
FAILS(cuEventSynchronize)
FAILS(cuEventCreate)
FAILS(cuEventDestroy_v2)
FAILS(cuEventRecord)
FAILS(cuEventQuery)
FAILS(cuLaunchHostFunc)

/* Leaves the attributes at zero: memory that CUDA has not allocated. */
int cuPointerGetAttributes(void);
int cuPointerGetAttributes(void)
{
	return 0;
}

int cuDriverGetVersion(int *version);
int cuDriverGetVersion(int *version)
{
	*version = 12000;
	return 0;
}
