// Runs CUDA kernels on the CPU, to test them where there is no GPU.
//
// A CUDA thread is a fiber; the fibers of a block share one host thread and give way only at
// barriers and warp collectives, in an order that the caller picks: the first warp as far as it can
// go, then the next; from the last; or any, shuffled by a seed. A kernel that lacks a barrier then
// gives other results in another order. Shared memory is
// allocated anew for every block and poisoned, each array by itself, so that AddressSanitizer sees
// where one ends. Aborts with the block and thread when threads of a barrier stand at different
// ones, a warp collective names absent lanes, or nothing can go on.
//
// Not modelled: time, and the weak memory of a GPU between barriers; races.hpp says whether it matters.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "races.hpp"
#include "switch.hpp"
#include "traffic.hpp"

struct Index3 {
    unsigned x, y, z;
};

namespace emulator {

/// What a fiber waits for.
enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

/// A copy to shared memory that has been started.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes;
    bool present;
    int group;
    bool made;
    size_t offset;  // in shared memory, for races
};

/// One CUDA thread.
struct Fiber {
    Context context;
    State state;
    unsigned lanes;  // of the warp barrier it waits at
    int place;       // which barrier
    bool odd;        // whether its warp has met an odd number of times
    Index3 thread;
    std::vector<Copy> copies;
    int group;       // of the copies that it starts next
    uint32_t syncs;  // of its warp that it has passed
};

/// What lanes show each other.
union Slot {
    uint64_t value;
    uint32_t words[6];
    const void* pointer;
};

/// How warps and lanes are ordered: 0 up, 1 down, else shuffled by the seed.
struct Options {
    int order = 0;
    unsigned seed = 1;
};

/// Memory that a launch may read, and write.
struct Range {
    uint64_t start, end;
    bool written;
};
struct Memory {
    std::vector<Range> ranges;  // none: anything is allowed
    bool finds_races = false;
    size_t last = 0;

    bool allows(uint64_t address, size_t bytes, bool written) {
        const auto holds = [&](const Range& range) {
            return range.start <= address && address + bytes <= range.end && (range.written || !written);
        };
        if (ranges.empty() || holds(ranges[last])) return true;
        for (last = 0; last + 1 < ranges.size() && !holds(ranges[last]);) last++;
        return holds(ranges[last]);
    }
};

/// Shared memory, on the largest alignment that an array of a kernel asks for.
constexpr std::align_val_t SHARED_ALIGNMENT{128};
struct FreeShared {
    void operator()(char* memory) const { operator delete[](memory, SHARED_ALIGNMENT); }
};
typedef std::unique_ptr<char[], FreeShared> SharedMemory;

/// The block that this host thread runs.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Slot> slots[2];  // of even and of odd meetings
    std::vector<std::pair<const void*, SharedMemory>> shared;
    SharedMemory dynamic_shared;
    size_t dynamic_shared_bytes = 0;
    size_t shared_bytes = 0;  // in all
    const std::function<void()>* body = nullptr;
    Context scheduler;
    int current = 0;
    Index3 index, grid, dimensions;
    uint32_t number = 0, epoch = 0;
    Memory memory;
    std::unique_ptr<Races> shared_races;
    /// By the end of what they are of: ranges of `memory`, those that overlap as one.
    std::map<uint64_t, std::pair<uint64_t, Races>> global_races;
    bool raced = false;
    Traffic* traffic = nullptr;  // counted, if it is there
    Options options;
    std::mt19937 random;

    Fiber& fiber() { return fibers[current]; }
    int lane() const { return current & 31; }
    int first_lane() const { return current & ~31; }

    /// Where the current thread is.
    Moment now() {
        const auto threads = uint32_t(fibers.size()), warps = (threads + 31) / 32;
        return {number * threads + current + 1, number, number * warps + current / 32, epoch,
                fiber().syncs};
    }

    [[noreturn]] void fail(const char* what) {
        const Index3 t = fiber().thread;
        fprintf(stderr, "emulated kernel: %s (block %u,%u,%u thread %u,%u,%u)\n", what, index.x,
                index.y, index.z, t.x, t.y, t.z);
        abort();
    }

    void poison(char* memory, size_t bytes) {
        // NaN in every float type; a large negative number; anything.
        if (options.order == 0) memset(memory, 0xff, bytes);
        if (options.order == 1) memset(memory, 0xcb, bytes);
        for (size_t i = 0; options.order > 1 && i < bytes; i++) memory[i] = char(random());
    }

    char* allocate_shared(size_t bytes) {
        // sm_86 and sm_89 have the least: 99 KiB a block.
        if ((shared_bytes += bytes) > 101376) fail("more than 99 KiB of shared memory");
        char* memory = new (SHARED_ALIGNMENT) char[bytes];
        poison(memory, bytes);
        return memory;
    }

    /// The array that `key` stands for.
    char* shared_array(const void* key, size_t bytes) {
        for (auto& [known, memory] : shared) {
            if (known == key) return memory.get();
        }
        shared.emplace_back(key, allocate_shared(bytes));
        return shared.back().second.get();
    }

    void wait(State state, unsigned lanes, int place) {
        Fiber& f = fiber();
        f.state = state;
        f.lanes = lanes;
        f.place = place;
        switch_context(f.context, scheduler);
    }
};

inline thread_local __attribute__((tls_model("initial-exec"))) Block* block = nullptr;

[[noreturn]] inline void run_fiber() {
    entered_context(block->fiber().context, block->scheduler);
    (*block->body)();
    block->fiber().state = State::Done;
    leave_context(block->fiber().context, block->scheduler);
}

/// Wakes the lanes of the complete barriers of the warp that begins at `first`; whether any were.
inline bool release_warp(int first) {
    Block& b = *block;
    const int end = std::min(first + 32, int(b.fibers.size()));
    bool any = false;
    for (int i = first; i < end; i++) {
        if (b.fibers[i].state != State::AtWarpBarrier) continue;
        const unsigned lanes = b.fibers[i].lanes;
        b.current = i;
        bool complete = true;
        for (int lane = 0; lane < 32 && complete; lane++) {
            if (!(lanes >> lane & 1)) continue;
            if (first + lane >= end) b.fail("a warp collective names a lane that the block lacks");
            const Fiber& f = b.fibers[first + lane];
            if (f.state == State::Done) b.fail("a warp collective names a lane that has ended");
            complete = f.state == State::AtWarpBarrier && f.lanes == lanes;
            if (complete && f.place != b.fibers[i].place) {
                b.fail("lanes are at different warp collectives");
            }
        }
        for (int lane = 0; complete && lane < 32; lane++) {
            if (lanes >> lane & 1) b.fibers[first + lane].state = State::Ready;
        }
        any |= complete;
    }
    return any;
}

/// Wakes all fibers if each is at the block's barrier or has ended; whether any live.
inline bool release_block() {
    Block& b = *block;
    int place = -1;
    for (size_t i = 0; i < b.fibers.size(); i++) {
        Fiber& f = b.fibers[i];
        if (f.state == State::Done) continue;
        b.current = int(i);
        if (f.state != State::AtBlockBarrier) b.fail("deadlock: a warp waits for lanes elsewhere");
        if (place >= 0 && place != f.place) b.fail("threads wait at different __syncthreads");
        place = f.place;
        f.state = State::Ready;
    }
    b.epoch++;
    return place >= 0;
}

/// What finds races in the memory of a launch.
inline std::map<uint64_t, std::pair<uint64_t, Races>> races_of(Memory memory) {
    std::map<uint64_t, std::pair<uint64_t, Races>> all;
    auto& ranges = memory.ranges;
    std::sort(ranges.begin(), ranges.end(),
              [](const Range& a, const Range& b) { return a.start < b.start; });
    for (size_t i = 0; memory.finds_races && i < ranges.size();) {
        const uint64_t start = ranges[i].start;
        uint64_t end = ranges[i].end;
        while (++i < ranges.size() && ranges[i].start < end) end = std::max(end, ranges[i].end);
        if (end > start) all.emplace(end, std::make_pair(start, Races(end - start, 1, true)));
    }
    return all;
}

/// The next warp to run: as far as one can go before the others (up, down), or any.
inline int pick_warp(const std::vector<int>& runnable) {
    Block& b = *block;
    if (b.options.order == 0) return *std::min_element(runnable.begin(), runnable.end());
    if (b.options.order == 1) return *std::max_element(runnable.begin(), runnable.end());
    return runnable[b.random() % runnable.size()];
}

/// Runs the fibers of the current block to their ends.
inline void run_block(std::vector<Stack>& stacks) {
    Block& b = *block;
    const int threads = int(b.fibers.size());
    for (int i = 0; i < threads; i++) {
        const unsigned t = unsigned(i), x = b.dimensions.x, y = b.dimensions.y;
        b.fibers[i] = Fiber{new_context(stacks[i], run_fiber), State::Ready, 0, 0, false,
                            {t % x, t / x % y, t / (x * y)}, {}, 0, 0};
    }
    std::vector<int> lanes(32), runnable;
    for (int lane = 0; lane < 32; lane++) lanes[lane] = b.options.order == 1 ? 31 - lane : lane;
    do {
        for (int warp = 0; warp < threads; warp += 32) runnable.push_back(warp);
        while (!runnable.empty()) {
            const int warp = pick_warp(runnable);
            if (b.options.order > 1) std::shuffle(lanes.begin(), lanes.end(), b.random);
            for (const int lane : lanes) {
                if (warp + lane >= threads || b.fibers[warp + lane].state != State::Ready) continue;
                b.current = warp + lane;
                switch_context(b.scheduler, b.fibers[b.current].context);
            }
            if (!release_warp(warp)) {
                runnable.erase(std::find(runnable.begin(), runnable.end(), warp));
            }
        }
    } while (release_block());
}

/// Runs `body` for every thread of the grid; whether no two of them raced.
inline bool launch(Index3 grid, Index3 threads, size_t dynamic_shared_bytes, const Memory& memory,
                   Traffic* traffic, Options options, const std::function<void()>& body) {
    static thread_local std::vector<Stack> stacks;
    const size_t count = size_t(threads.x) * threads.y * threads.z;
    while (stacks.size() < count) stacks.emplace_back();
    Block b;
    b.fibers.resize(count);
    for (auto& slots : b.slots) slots.resize((count + 31) / 32 * 32);
    b.body = &body;
    b.grid = grid;
    b.dimensions = threads;
    b.dynamic_shared_bytes = dynamic_shared_bytes;
    b.memory = memory;
    b.global_races = races_of(memory);
    b.traffic = traffic;
    b.options = options;
    b.random.seed(options.seed);
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    block = &b;
    for (size_t n = 0; n < blocks; n++) {
        const size_t i = options.order == 1 ? blocks - 1 - n : n;
        b.number = uint32_t(i);
        b.epoch++;
        b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                   unsigned(i / grid.x / grid.y)};
        b.shared.clear();
        b.shared_bytes = 0;
        b.dynamic_shared.reset(b.allocate_shared(dynamic_shared_bytes));
        run_block(stacks);
        if (traffic) traffic->end_block();
    }
    block = nullptr;
    return !b.raced;
}

/// Shows a slot to the lanes, and runs `read` when all have shown theirs. What a whole warp shows next
/// is shown in other slots, and it meets for that only when all have read; some of its lanes, or all
/// that read what is not in slots, meet once more before they go on.
template <class Show, class Read>
inline auto collective(unsigned lanes, int place, Show show, Read read, bool in_slots = true) {
    auto& slots = block->slots[block->fiber().odd];
    show(slots[block->current]);
    block->wait(State::AtWarpBarrier, lanes, 2 * place);
    const auto result = read(&slots[block->first_lane()]);
    if (lanes == ~0u) block->fiber().odd ^= true;
    if (lanes != ~0u || !in_slots) block->wait(State::AtWarpBarrier, lanes, 2 * place + 1);
    return result;
}

/// A kernel, and what its launch needs to know.
struct Kernel {
    const char* name;
    unsigned largest_block;
    /// A letter a parameter: p pointer, i 4-byte integer, l 8-byte integer, f float, d double. In PTX a
    /// pointer is an 8-byte integer.
    const char* signature;
    void (*invoke)(void** arguments);
};

inline void make(Copy& copy) {
    copy.made = true;
    if (copy.present) {
        memcpy(copy.to, copy.from, copy.bytes);
    } else {
        memset(copy.to, 0, copy.bytes);
    }
}
/// The copy happens at once, when it is waited for, or either, by order: what reads too early or
/// overwrites too early shows in one of them.
inline void start_copy(void* to, const void* from, unsigned bytes, bool present, size_t offset = 0) {
    Fiber& fiber = block->fiber();
    const int order = block->options.order;
    const bool later = order == 1 || (order > 1 && block->random() % 2 == 0);
    fiber.copies.push_back({to, from, bytes, present, fiber.group, false, offset});
    if (!later) make(fiber.copies.back());
}
inline void end_group_of_copies() { block->fiber().group++; }
/// Until at most `pending` groups of this thread are unfinished; `arrived` is told of each copy.
template <class Arrived>
inline void wait_for_copies(int pending, Arrived arrived) {
    Fiber& fiber = block->fiber();
    auto done = fiber.copies.begin();
    for (; done != fiber.copies.end() && done->group < fiber.group - pending; ++done) {
        if (!done->made) make(*done);
        arrived(*done);
    }
    fiber.copies.erase(fiber.copies.begin(), done);
}

}  // namespace emulator
