/*
 * dmabuf._exporter: a base class that gives Python classes the buffer protocol.
 *
 * Python 3.12 has __buffer__ for that (PEP 688), and Python 3.11 nothing. A subclass defines
 * export(), which returns a memoryview of its memory, and unexport(), which is called once for each
 * export() when the consumer has released the memory.
 *
 * It is not part of the C core, which has no Python.h.
 */

#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030b0000 /* Py_buffer is in the limited API since Python 3.11 */
#endif
#include <Python.h>

static void unexport(PyObject *self)
{
	PyObject *type, *value, *traceback, *done;

	PyErr_Fetch(&type, &value, &traceback);
	done = PyObject_CallMethod(self, "unexport", NULL);
	if (!done)
		PyErr_WriteUnraisable(self);
	Py_XDECREF(done);
	PyErr_Restore(type, value, traceback);
}

static int get_buffer(PyObject *self, Py_buffer *view, int flags)
{
	PyObject *memory = PyObject_CallMethod(self, "export", NULL);
	Py_buffer *inner;
	int failed;

	view->obj = NULL;
	if (!memory)
		return -1;
	inner = PyMem_Malloc(sizeof(*inner));
	if (!inner)
		PyErr_NoMemory();
	failed = !inner || PyObject_GetBuffer(memory, inner, flags);
	Py_DECREF(memory);
	if (failed) {
		PyMem_Free(inner);
		unexport(self);
		return -1;
	}
	*view = *inner;
	view->obj = Py_NewRef(self);
	view->internal = inner;
	return 0;
}

static void release_buffer(PyObject *self, Py_buffer *view)
{
	PyBuffer_Release(view->internal);
	PyMem_Free(view->internal);
	unexport(self);
}

static PyType_Slot slots[] = {
	{Py_bf_getbuffer, get_buffer},
	{Py_bf_releasebuffer, release_buffer},
	{Py_tp_doc, "A base class of objects with the buffer protocol."},
	{0, NULL},
};

static PyType_Spec spec = {
	.name = "dmabuf._exporter.Exporter",
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = slots,
};

static int execute(PyObject *module)
{
	PyObject *type = PyType_FromSpec(&spec);
	int failed = !type || PyModule_AddObjectRef(module, "Exporter", type);

	Py_XDECREF(type);
	return failed ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {
	{Py_mod_exec, execute},
	{0, NULL},
};

static PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "dmabuf._exporter",
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__exporter(void)
{
	return PyModuleDef_Init(&module);
}
