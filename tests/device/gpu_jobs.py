"""Small Vulkan jobs for the tests: fills and copies, with semaphores around them."""

from collections.abc import Callable, Sequence

import vulkan as vk

from dmabuf.devices import vulkan


class Jobs:
    """A command pool of a device's, and how to submit to its queue."""

    def __init__(self, gpu: vulkan.Device) -> None:
        self.gpu = gpu
        about = vk.VkCommandPoolCreateInfo(queueFamilyIndex=gpu.queue_family)
        self.pool = vk.vkCreateCommandPool(gpu.handle, about, None)
        self.fence = vk.vkCreateFence(gpu.handle, vk.VkFenceCreateInfo(), None)

    def close(self) -> None:
        self.gpu.wait_idle()
        vk.vkDestroyFence(self.gpu.handle, self.fence, None)
        vk.vkDestroyCommandPool(self.gpu.handle, self.pool, None)

    def fill(self, memory: vulkan.Memory, word: int, **around: vulkan.Semaphore) -> None:
        """Write the word all over the memory."""
        self.submit(
            [memory],
            lambda job: vk.vkCmdFillBuffer(job, memory.vk_buffer, 0, memory.size, word),
            **around,
        )

    def copy(
        self, source: vulkan.Memory, target: vulkan.Memory, **around: vulkan.Semaphore
    ) -> None:
        """Copy all of one memory to another."""
        whole = vk.VkBufferCopy(size=target.size)
        self.submit(
            [source, target],
            lambda job: vk.vkCmdCopyBuffer(job, source.vk_buffer, target.vk_buffer, 1, [whole]),
            **around,
        )

    def submit(
        self,
        used: Sequence[vulkan.Memory],
        record: Callable[[object], object],
        wait: vulkan.Semaphore | None = None,
        signal: vulkan.Semaphore | None = None,
    ) -> None:
        asked = vk.VkCommandBufferAllocateInfo(commandPool=self.pool, commandBufferCount=1)
        (job,) = vk.vkAllocateCommandBuffers(self.gpu.handle, asked)
        vk.vkBeginCommandBuffer(job, vk.VkCommandBufferBeginInfo())
        for memory in used:
            memory.acquire(job)
        record(job)
        for memory in used:
            memory.release(job)
        vk.vkEndCommandBuffer(job)
        about = vk.VkSubmitInfo(
            pCommandBuffers=[job],
            pWaitSemaphores=[wait.handle] if wait else [],
            pWaitDstStageMask=[vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT] if wait else [],
            pSignalSemaphores=[signal.handle] if signal else [],
        )
        vk.vkResetFences(self.gpu.handle, 1, [self.fence])
        vk.vkQueueSubmit(self.gpu.queue, 1, [about], self.fence)

    def ended(self, seconds: float) -> bool:
        """Whether the job submitted last ends within so many seconds."""
        try:
            vk.vkWaitForFences(self.gpu.handle, 1, [self.fence], True, int(seconds * 1e9))
        except vk.VkTimeout:
            return False
        return True
