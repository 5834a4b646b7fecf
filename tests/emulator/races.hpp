// Finds accesses of two threads to the same memory, one of them a write, that nothing puts in order: a
// program without any does the same under every memory model.
//
// What orders accesses of a block is its barrier; within a warp, bar.warp.sync of all its lanes, too, but
// no shuffle. Nothing orders the blocks of a launch. An asynchronous copy writes from when it is
// started until its thread has waited for it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

/// Where a thread is in the order of its launch.
struct Moment {
    uint32_t thread = 0;  // of the grid, from 1; 0 is nobody
    uint32_t block = 0;
    uint32_t warp = 0;   // of the grid
    uint32_t epoch = 0;  // barriers of blocks that there were, and blocks that began
    uint32_t syncs = 0;  // of the warp

    /// Whether what happened at `earlier`, in this block, is surely over.
    bool is_after(const Moment& earlier) const {
        if (earlier.thread == thread) return true;
        return earlier.epoch < epoch || (earlier.warp == warp && earlier.syncs < syncs);
    }
};

/// The last accesses to each unit of some memory, which every block has for itself or all have together.
class Races {
  public:
    Races(size_t bytes, size_t unit, bool of_all_blocks)
        : unit(unit), of_all_blocks(of_all_blocks), cells((bytes + unit - 1) / unit) {}

    /// Whether a read of `bytes` at `offset` races with a write.
    bool read(size_t offset, size_t bytes, const Moment& now) {
        bool races = false;
        for (size_t i = offset / unit; i <= (offset + bytes - 1) / unit; i++) {
            Cell& cell = cells[i];
            races |= is_copying(cell, now) || !is_after(now, cell.write);
            if (cell.read.thread != now.thread) {
                const bool together = cell.read.thread != 0 && cell.read.epoch == now.epoch;
                if (together && cell.read.warp != now.warp) cell.several_warps = now.epoch;
                cell.other_read = cell.read;
            }
            cell.read = now;
        }
        return races;
    }
    /// Whether a write does, with a read or a write. One that is `copying` goes on until it has arrived.
    bool write(size_t offset, size_t bytes, const Moment& now, bool copying = false) {
        bool races = false;
        for (size_t i = offset / unit; i <= (offset + bytes - 1) / unit; i++) {
            Cell& cell = cells[i];
            races |= is_copying(cell, now) || cell.several_warps == now.epoch;
            for (const Moment* access : {&cell.write, &cell.read, &cell.other_read}) {
                races |= !is_after(now, *access);
            }
            cell.write = now;
            cell.copying = copying;
        }
        return races;
    }
    /// What was copied there is there.
    void arrived(size_t offset, size_t bytes, const Moment& now) {
        for (size_t i = offset / unit; i <= (offset + bytes - 1) / unit; i++) {
            cells[i].write = now;
            cells[i].copying = false;
        }
    }

  private:
    struct Cell {
        Moment write, read, other_read;
        uint32_t several_warps = 0;  // the epoch in which more than one read it
        bool copying = false;
    };
    bool is_after(const Moment& now, const Moment& earlier) const {
        if (earlier.thread == 0) return true;
        return earlier.block == now.block ? now.is_after(earlier) : !of_all_blocks;
    }
    bool is_copying(const Cell& cell, const Moment& now) const {
        return cell.copying && cell.write.block == now.block;
    }
    size_t unit;
    bool of_all_blocks;
    std::vector<Cell> cells;
};

}  // namespace emulator
