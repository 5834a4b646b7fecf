// Counts what the memory accesses of warps cost: how many banks of shared memory they wait for, how many
// sectors of global memory they move, beside the fewest that would do.
//
// The lanes of a warp access together what they access at the same line for the same time. Shared memory
// has 32 banks of 4 bytes; accesses of 8 and 16 bytes a lane go in two and four parts of neighbouring
// lanes, as do the rows of ldmatrix. A sector has 32 bytes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

namespace emulator {

class Traffic {
  public:
    /// What all warps did at a line to one kind of memory.
    struct Line {
        bool written;
        uint64_t cost, fewest;
    };
    /// By place: twice the line, and one more for shared memory, as cp.async uses both.
    std::map<int, Line> lines;

    void access(int line, bool shared, bool written, uint64_t address, unsigned bytes, int thread) {
        const int place = 2 * line + shared;
        const uint32_t time = times[key(place, thread)]++;
        auto& warp = requests[key(place, thread / 32)];
        if (warp.size() <= time) warp.resize(time + 1);
        warp[time].written = written;
        warp[time].bytes = bytes;
        warp[time].addresses.emplace_back(thread % 32, address);
    }
    /// Counts what the threads of a block did.
    void end_block() {
        for (const auto& [which, warp] : requests) {
            const int place = int(which >> 32);
            Line& line = lines.try_emplace(place, Line{warp[0].written, 0, 0}).first->second;
            for (const Request& request : warp) {
                place % 2 ? count_banks(request, line) : count_sectors(request, line);
            }
        }
        requests.clear();
        times.clear();
    }

  private:
    struct Request {
        bool written;
        unsigned bytes;
        std::vector<std::pair<int, uint64_t>> addresses;  // of lanes
    };
    static uint64_t key(int place, int number) { return uint64_t(place) << 32 | unsigned(number); }

    static void count_banks(const Request& request, Line& line) {
        const int lanes = request.bytes <= 4 ? 32 : int(128 / request.bytes);
        for (int first = 0; first < 32; first += lanes) {
            std::set<uint64_t> words[32];
            for (const auto& [lane, address] : request.addresses) {
                if (lane / lanes != first / lanes) continue;
                for (uint64_t word = address / 4; word <= (address + request.bytes - 1) / 4; word++) {
                    words[word % 32].insert(word);
                }
            }
            size_t deepest = 0, all = 0;
            for (const auto& bank : words) {
                deepest = std::max(deepest, bank.size());
                all += bank.size();
            }
            line.cost += deepest;
            line.fewest += (all + 31) / 32;
        }
    }
    static void count_sectors(const Request& request, Line& line) {
        std::set<uint64_t> sectors, accessed;
        for (const auto& [lane, address] : request.addresses) {
            for (uint64_t byte = address; byte < address + request.bytes; byte++) {
                sectors.insert(byte / 32);
                accessed.insert(byte);
            }
        }
        line.cost += sectors.size();
        line.fewest += (accessed.size() + 31) / 32;
    }

    std::unordered_map<uint64_t, uint32_t> times;               // by place and thread
    std::unordered_map<uint64_t, std::vector<Request>> requests;  // by place and warp
};

}  // namespace emulator
