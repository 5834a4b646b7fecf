// libnibble_emulated.so: every kernel of kernels.cu behind one function, launched as
// cuLaunchKernel would.
#include "emulator.hpp"
// Kernels after what they are written in.
#include "device.cuh"

inline bfloat16 to_bf16(float x) { return bfloat16{bf16_bits(x)}; }
inline float to_f32(float16 x) { return f16_value(x.bits); }

#include "kernels.cu"

namespace {

using Invoke = void (*)(void** arguments);

/// Kinds of parameters: p pointer, i 4-byte integer, l 8-byte integer, f float, d double.
template <class T>
constexpr char kind() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_same<T, double>::value) return 'd';
    return sizeof(T) == 8 ? 'l' : 'i';
}

template <class Function, Function* Kernel>
struct Entry;
template <class... Arguments, void (*Kernel)(Arguments...)>
struct Entry<void(Arguments...), Kernel> {
    template <size_t... I>
    static void unpack(void** arguments, std::index_sequence<I...>) {
        Kernel(*static_cast<Arguments*>(arguments[I])...);
    }
    static constexpr char SIGNATURE[] = {kind<Arguments>()..., 0};
    static void invoke(void** arguments) {
        unpack(arguments, std::index_sequence_for<Arguments...>());
    }
};

struct Kernel {
    const char* name;
    unsigned largest_block;
    const char* signature;
    Invoke invoke;
};

const Kernel KERNELS[] = {
#define NIBBLE_ENTRY(largest_block, name)                               \
    {#name, largest_block, Entry<decltype(name), name>::SIGNATURE, \
     Entry<decltype(name), name>::invoke},
#include "entries.inc"  // written by build.sh
};

thread_local emulator::Options options;

}  // namespace

extern "C" {

/// Sets how this host thread's launches order fibers: 0 up, 1 down, 2 shuffled by `seed`.
void nibble_emulation(int order, unsigned seed) { options = {order, seed}; }

/// The kinds of the parameters of `kernel`, a letter each; null if there is no such kernel.
const char* nibble_signature(const char* kernel) {
    for (const Kernel& known : KERNELS) {
        if (strcmp(known.name, kernel) == 0) return known.signature;
    }
    return nullptr;
}

/// Launches `kernel`; `arguments` are pointers to each argument. 0: done, 1: no such kernel,
/// 2: a grid or block that the kernel or a GPU does not take.
int nibble_launch(const char* kernel, const unsigned grid[3], const unsigned block[3],
                  size_t dynamic_shared_bytes, void** arguments) {
    for (const Kernel& known : KERNELS) {
        if (strcmp(known.name, kernel) != 0) continue;
        const size_t threads = size_t(block[0]) * block[1] * block[2];
        const bool empty = size_t(grid[0]) * grid[1] * grid[2] == 0 || threads == 0;
        if (empty || threads > known.largest_block || grid[1] > 65535 || grid[2] > 65535) return 2;
        emulator::launch({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                         dynamic_shared_bytes, options, [&] { known.invoke(arguments); });
        return 0;
    }
    return 1;
}

}  // extern "C"
