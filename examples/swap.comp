#version 450
// Swaps the bytes of each 32-bit word of a buffer. Compiled: glslangValidator -V swap.comp -o swap.spv
layout(local_size_x = 64) in;
layout(set = 0, binding = 0) buffer Words { uint words[]; };

void main() {
    uint step = gl_NumWorkGroups.x * gl_WorkGroupSize.x;
    for (uint i = gl_GlobalInvocationID.x; i < words.length(); i += step) {
        uint x = words[i];
        words[i] = x << 24 | (x & 0xff00u) << 8 | (x >> 8 & 0xff00u) | x >> 24;
    }
}
