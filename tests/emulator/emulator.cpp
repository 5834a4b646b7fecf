// A library with every kernel behind one function, launched as cuLaunchKernel would. NIBBLE_KERNELS
// is the file that has them as a table `KERNELS`: source.hpp, or a translation of kernels.ptx.
#include "emulator.hpp"
#include NIBBLE_KERNELS

namespace {

thread_local emulator::Options options;
thread_local emulator::Memory memory;
thread_local bool counts = false;
thread_local emulator::Traffic traffic;

}  // namespace

extern "C" {

/// Sets how this host thread's launches order fibers: 0 up, 1 down, 2 shuffled by `seed`.
void nibble_emulation(int order, unsigned seed) { options = {order, seed}; }

/// Sets what this host thread's launches may read and write, anything if `count` is 0, and whether races
/// are looked for.
void nibble_memory(const emulator::Range* ranges, size_t count, int finds_races) {
    memory = {{ranges, ranges + count}, finds_races != 0};
}

/// Whether this host thread's launches from now on count their accesses; those before are forgotten.
void nibble_count_traffic(int does) {
    counts = does != 0;
    traffic = {};
}

/// The next place, from `place` on, at which the launches since accessed memory, see traffic.hpp; 0 if there
/// is none. With whether it was written, what that cost and the fewest it could.
int nibble_traffic(int place, uint64_t found_there[3]) {
    const auto found = traffic.lines.lower_bound(place);
    if (found == traffic.lines.end()) return 0;
    const emulator::Traffic::Line& seen = found->second;
    const uint64_t values[3] = {seen.written, seen.cost, seen.fewest};
    std::copy(values, values + 3, found_there);
    return found->first;
}

/// The kinds of the parameters of `kernel`, a letter each; null if there is no such kernel.
const char* nibble_signature(const char* kernel) {
    for (const emulator::Kernel& known : KERNELS) {
        if (strcmp(known.name, kernel) == 0) return known.signature;
    }
    return nullptr;
}

/// Launches `kernel`; `arguments` are pointers to each argument. 0: done, 1: no such kernel,
/// 2: a grid or block that the kernel or a GPU does not take, 3: threads raced, as was printed.
int nibble_launch(const char* kernel, const unsigned grid[3], const unsigned block[3],
                  size_t dynamic_shared_bytes, void** arguments) {
    for (const emulator::Kernel& known : KERNELS) {
        if (strcmp(known.name, kernel) != 0) continue;
        const size_t threads = size_t(block[0]) * block[1] * block[2];
        const bool empty = size_t(grid[0]) * grid[1] * grid[2] == 0 || threads == 0;
        if (empty || threads > known.largest_block || grid[1] > 65535 || grid[2] > 65535) return 2;
        const Index3 blocks = {grid[0], grid[1], grid[2]}, size = {block[0], block[1], block[2]};
        const bool good = emulator::launch(blocks, size, dynamic_shared_bytes, memory,
                                           counts ? &traffic : nullptr, options,
                                           [&] { known.invoke(arguments); });
        return good ? 0 : 3;
    }
    return 1;
}

}  // extern "C"
