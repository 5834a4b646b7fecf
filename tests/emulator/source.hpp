// The kernels as kernels.cu has them, for emulator.cpp.
#pragma once
#include "instructions.hpp"
// Kernels after what they are written in.
#include "device.cuh"

inline bfloat16 to_bf16(float x) { return bfloat16{bf16_bits(x)}; }

#include "kernels.cu"

namespace {

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

const emulator::Kernel KERNELS[] = {
#define NIBBLE_ENTRY(largest_block, name)                               \
    {#name, largest_block, Entry<decltype(name), name>::SIGNATURE, \
     Entry<decltype(name), name>::invoke},
#include "entries.inc"  // written by build.sh
};

}  // namespace
