"""Read a file into memory that a GPU shares, change it by a compute shader, and write it.

    python examples/gpu_swap.py big-endian.raw little-endian.raw

It swaps the bytes of each 32-bit word. The CPU touches none of them: the drive writes into the
buffer, the GPU works there, and the drive reads the buffer after the GPU's fence has signalled.
Needs a Vulkan driver (apt install mesa-vulkan-drivers libvulkan1) and pip install dmabuf[vulkan].
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import vulkan as vk

import dmabuf
from dmabuf.devices import vulkan

SHADER = Path(__file__).with_name("swap.spv")  # compiled from swap.comp


def record(gpu: vulkan.Device, memory: vulkan.Memory, undo: ExitStack) -> object:
    """A command buffer that runs the shader over all of the memory. Ordinary Vulkan."""

    def make(kind: str, **about: object) -> object:
        handle = getattr(vk, f"vkCreate{kind}")(
            gpu.handle, getattr(vk, f"Vk{kind}CreateInfo")(**about), None
        )
        undo.callback(getattr(vk, f"vkDestroy{kind}"), gpu.handle, handle, None)
        return handle

    code = SHADER.read_bytes()
    shader = make("ShaderModule", codeSize=len(code), pCode=code)
    words = vk.VkDescriptorSetLayoutBinding(
        binding=0,
        descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
        descriptorCount=1,
        stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT,
    )
    set_layout = make("DescriptorSetLayout", pBindings=[words])
    layout = make("PipelineLayout", pSetLayouts=[set_layout])
    stage = vk.VkPipelineShaderStageCreateInfo(
        stage=vk.VK_SHADER_STAGE_COMPUTE_BIT, module=shader, pName="main"
    )
    about = vk.VkComputePipelineCreateInfo(stage=stage, layout=layout)
    (pipeline,) = vk.vkCreateComputePipelines(gpu.handle, None, 1, [about], None)
    undo.callback(vk.vkDestroyPipeline, gpu.handle, pipeline, None)

    size = vk.VkDescriptorPoolSize(type=words.descriptorType, descriptorCount=1)
    pool = make("DescriptorPool", maxSets=1, pPoolSizes=[size])
    wanted = vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=[set_layout])
    (set_,) = vk.vkAllocateDescriptorSets(gpu.handle, wanted)
    whole = vk.VkDescriptorBufferInfo(buffer=memory.vk_buffer, range=memory.size)
    write = vk.VkWriteDescriptorSet(
        dstSet=set_, descriptorType=words.descriptorType, pBufferInfo=[whole]
    )
    vk.vkUpdateDescriptorSets(gpu.handle, 1, [write], 0, None)

    commands = make("CommandPool", queueFamilyIndex=gpu.queue_family)
    (job,) = vk.vkAllocateCommandBuffers(
        gpu.handle, vk.VkCommandBufferAllocateInfo(commandPool=commands, commandBufferCount=1)
    )
    vk.vkBeginCommandBuffer(job, vk.VkCommandBufferBeginInfo())
    memory.acquire(job)
    vk.vkCmdBindPipeline(job, vk.VK_PIPELINE_BIND_POINT_COMPUTE, pipeline)
    vk.vkCmdBindDescriptorSets(
        job, vk.VK_PIPELINE_BIND_POINT_COMPUTE, layout, 0, 1, [set_], 0, None
    )
    vk.vkCmdDispatch(job, min(-(-memory.size // 256), 65535), 1, 1)
    memory.release(job)
    vk.vkEndCommandBuffer(job)
    return job


def main(source: str, target: str) -> None:
    size = os.path.getsize(source)
    with vulkan.open() as gpu, dmabuf.allocate(size, exporter="udmabuf") as buffer:
        print(f"{buffer.exporter} buffer of {buffer.size:,} bytes, shared with {gpu.name}")
        with gpu.import_buffer(buffer) as memory, ExitStack() as undo:
            job = record(gpu, memory, undo)
            with dmabuf.open(source) as file:
                show("file to buffer", file.read_into(buffer, size))
            with gpu.semaphore() as done:
                about = vk.VkSubmitInfo(pCommandBuffers=[job], pSignalSemaphores=[done.handle])
                vk.vkQueueSubmit(gpu.queue, 1, [about], vk.VK_NULL_HANDLE)
                memory.add_fence(done, "write")  # from now on transfers wait for the job
                with dmabuf.open(target, "w") as file:
                    show("buffer to file", file.write_from(buffer, size, sync=True, timeout=60))
                gpu.wait_idle()


def show(what: str, transfer: dmabuf.Transfer) -> None:
    copied = f"{transfer.copied:,} bytes copied by the CPU"
    print(f"{what}: {transfer.nbytes:,} bytes, {transfer.route}, {copied}")


if __name__ == "__main__":
    main(*sys.argv[1:])
