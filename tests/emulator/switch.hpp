// Switching between fibers: the registers that a call keeps, in a few instructions, on x86-64 and
// aarch64; AddressSanitizer is told of every switch.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

/// A fiber's stack.
struct Stack {
    static constexpr size_t BYTES = 256 << 10;
    char* memory;

    Stack() {
        void* map = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) abort();
        memory = static_cast<char*>(map);
    }
    Stack(Stack&& other) noexcept : memory(other.memory) { other.memory = nullptr; }
    Stack(const Stack&) = delete;
    ~Stack() {
        if (memory) munmap(memory, BYTES);
    }
};

/// A stopped fiber or scheduler.
struct Context {
    void* stack_pointer = nullptr;
    // For AddressSanitizer: bounds of the stack and its shadow of locals.
    const void* bottom = nullptr;
    size_t bytes = 0;
    void* fake_stack = nullptr;
};

extern "C" void nibble_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.type nibble_switch_stack, @function
nibble_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr int SAVED_WORDS = 6;
constexpr int RETURN_WORD = 6;
constexpr int FRAME_WORDS = 8;  // one more so that the entry sees the alignment of a call
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 2
.type nibble_switch_stack, %function
nibble_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int RETURN_WORD = 11;  // x30
constexpr int FRAME_WORDS = 20;
#else
#error "the emulator switches fibers on x86-64 and aarch64"
#endif

/// A fiber that will begin in `entry`.
inline Context new_context(Stack& stack, void (*entry)()) {
    auto* frame = reinterpret_cast<uint64_t*>(stack.memory + Stack::BYTES) - FRAME_WORDS;
    for (int i = 0; i < FRAME_WORDS; i++) frame[i] = 0;
    frame[RETURN_WORD] = reinterpret_cast<uint64_t>(entry);
    return {frame, stack.memory, Stack::BYTES, nullptr};
}

/// Stops `from`, continues `to`.
inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
    nibble_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

/// First thing in a fiber that `from` has switched to.
inline void entered_context([[maybe_unused]] Context& self, [[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, &from.bottom, &from.bytes);
#endif
}

/// Last thing in a fiber.
[[noreturn]] inline void leave_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, to.bottom, to.bytes);
#endif
    nibble_switch_stack(&from.stack_pointer, to.stack_pointer);
    abort();
}

}  // namespace emulator
