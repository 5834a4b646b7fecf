// The instructions of kernels.ptx on the CPU, as the PTX ISA describes them: what ptx/ translates to.
//
// Written from the ISA and not from instructions.hpp, so that the two can disagree. Stricter than a
// GPU: every access to memory has its alignment and its bounds. Where the ISA promises a result
// within an error, it has that error, up or down by the bits of the operands; products of tensor
// cores are added without rounding and cut to f32.
#pragma once
#include <cmath>
#include <limits>

#include "emulator.hpp"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

[[noreturn]] inline void fail(int line, const char* what) {
    char text[200];
    snprintf(text, sizeof(text), "kernels.ptx:%d: %s", line, what);
    emulator::block->fail(text);
}

// ---- registers

/// The low bytes of a register.
template <class T, class Register>
inline T as(Register x) {
    static_assert(sizeof(T) <= sizeof(Register), "a register is wide enough");
    T value;
    memcpy(&value, &x, sizeof(T));
    return value;
}
/// Into a register: its bits, or extended by the sign of its type.
template <class Register, class T>
inline void put(Register& to, T value) {
    if constexpr (sizeof(Register) == sizeof(T)) {
        memcpy(&to, &value, sizeof(T));
    } else {
        static_assert(std::is_integral<T>::value && std::is_integral<Register>::value &&
                          sizeof(T) < sizeof(Register),
                      "only integers are extended");
        to = Register(value);
    }
}
template <class T>
inline T argument(void* const* arguments, int index) {
    T value;
    memcpy(&value, arguments[index], sizeof(T));
    return value;
}

inline Index3 tid() { return emulator::block->fiber().thread; }
inline Index3 ntid() { return emulator::block->dimensions; }
inline Index3 ctaid() { return emulator::block->index; }
inline Index3 nctaid() { return emulator::block->grid; }

// ---- memory

/// Where shared memory begins: the first KiB is the system's.
constexpr u64 SHARED_BASE = 1024;
constexpr u64 SHARED_BYTES = 100 << 10;

enum class Access { Read, Write, Copy };

inline void note(emulator::Races& races, Access access, u64 offset, size_t bytes, int line) {
    emulator::Block& block = *emulator::block;
    const emulator::Moment now = block.now();
    const bool found = access == Access::Read ? races.read(offset, bytes, now)
                                              : races.write(offset, bytes, now, access == Access::Copy);
    if (found && !block.raced) {
        fprintf(stderr,
                "emulated kernel: kernels.ptx:%d: memory that another thread uses"
                " (block %u thread %d)\n",
                line, block.number, block.current);
    }
    block.raced |= found;
}
/// Notes an access to shared memory; the first of a launch that races is printed.
inline void note_shared(Access access, u64 offset, size_t bytes, int line) {
    emulator::Block& block = *emulator::block;
    if (block.traffic) {
        const bool written = access != Access::Read;
        block.traffic->access(line, true, written, offset, unsigned(bytes), block.current);
    }
    if (!block.memory.finds_races) return;
    auto& races = block.shared_races;
    if (!races) races.reset(new emulator::Races(SHARED_BYTES, 4, false));
    note(*races, access, offset, bytes, line);
}
inline void note_global(Access access, u64 address, size_t bytes, int line) {
    emulator::Block& block = *emulator::block;
    if (block.traffic) {
        // As if every buffer began where a GPU's do, at a multiple of 256.
        const emulator::Memory& memory = block.memory;
        const u64 start = memory.ranges.empty() ? 0 : memory.ranges[memory.last].start;
        const bool written = access != Access::Read;
        block.traffic->access(line, false, written, address - start, unsigned(bytes), block.current);
    }
    auto& all = block.global_races;
    const auto found = all.upper_bound(address);
    if (found == all.end() || address < found->second.first) return;
    note(found->second.second, access, address - found->second.first, bytes, line);
}
/// The `bytes` at `address` of shared memory, of which the kernel has `fixed` and the launch gives more.
inline char* shared(Access access, u64 address, size_t bytes, size_t fixed, int line) {
    static const char key = 0;
    emulator::Block& block = *emulator::block;
    if (address % bytes != 0) fail(line, "a shared address is not aligned to what is accessed");
    const u64 dynamic = SHARED_BASE + (fixed + 127) / 128 * 128;
    char* found = nullptr;
    if (address >= SHARED_BASE && address + bytes <= SHARED_BASE + fixed) {
        found = block.shared_array(&key, fixed) + (address - SHARED_BASE);
    } else if (address >= dynamic && address + bytes <= dynamic + block.dynamic_shared_bytes) {
        found = block.dynamic_shared.get() + (address - dynamic);
    } else {
        fail(line, "outside of shared memory");
    }
    note_shared(access, address - SHARED_BASE, bytes, line);
    return found;
}
/// The `bytes` at `address` of global memory, whoever else uses them.
inline char* reachable(u64 address, size_t bytes, bool written, int line) {
    if (address < SHARED_BASE + SHARED_BYTES) {
        fail(line, "an address of shared memory, or none, where a global one is meant");
    }
    if (address % bytes != 0) fail(line, "a global address is not aligned to what is accessed");
    if (!emulator::block->memory.allows(address, bytes, written)) {
        fail(line, written ? "a write outside of the buffers that may be written"
                           : "a read outside of the buffers");
    }
    return reinterpret_cast<char*>(address);
}
inline char* global(u64 address, size_t bytes, bool written, int line) {
    char* found = reachable(address, bytes, written, line);
    note_global(written ? Access::Write : Access::Read, address, bytes, line);
    return found;
}
template <class T>
inline T load(const char* from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
inline void store(char* to, T value) {
    memcpy(to, &value, sizeof(T));
}

/// cp.async: `present` of `bytes` are copied, zeros follow. At once, at the wait, or either.
inline void copy_async(u32 to, u64 from, unsigned bytes, unsigned present, size_t fixed, int line) {
    if (present != 0 && present != bytes) fail(line, "a copy of a part");
    const char* source = present ? global(from, bytes, false, line) : nullptr;
    char* target = shared(Access::Copy, to, bytes, fixed, line);
    emulator::start_copy(target, source, bytes, present != 0, to - SHARED_BASE);
}
inline void wait_for_copies(int pending) {
    emulator::wait_for_copies(pending, [](const emulator::Copy& copy) {
        emulator::Block& block = *emulator::block;
        if (block.shared_races) block.shared_races->arrived(copy.offset, copy.bytes, block.now());
    });
}

// ---- integers

template <class T>
inline T shl(T x, u32 by) {
    return by >= 8 * sizeof(T) ? 0 : T(x << by);
}
template <class T>
inline T shr(T x, u32 by) {
    const u32 bits = 8 * sizeof(T);
    if (by >= bits) return x < 0 ? T(-1) : T(0);
    return T(x >> by);
}
/// Arithmetic wraps.
template <class T>
inline T sum(T a, T b) {
    using U = std::make_unsigned_t<T>;
    return T(U(a) + U(b));
}
template <class T>
inline T difference(T a, T b) {
    using U = std::make_unsigned_t<T>;
    return T(U(a) - U(b));
}
template <class T>
inline T product(T a, T b) {
    using U = std::make_unsigned_t<T>;
    return T(U(u64(U(a)) * u64(U(b))));
}
template <class T>
inline T quotient(T a, T b, int line) {
    if (b == 0) fail(line, "a division by zero");
    return T(a / b);
}
template <class T>
inline T remainder(T a, T b, int line) {
    if (b == 0) fail(line, "a division by zero");
    return T(a % b);
}
template <class T>
inline T negative(T a) {
    return difference(T(0), a);
}
template <class T>
inline T inverse(T a) {
    return T(~a);
}
/// prmt: byte i of the result is the byte of {b, a} that nibble i of the selector names.
inline u32 permute(u32 a, u32 b, u32 selector, int line) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i) & 15;
        if (nibble & 8) fail(line, "prmt with a sign");
        result |= u32(bytes >> (8 * nibble) & 255) << (8 * i);
    }
    return result;
}
/// bfi: bits `from` .. `from + count` of `b` are the lowest of `a`.
inline u32 insert(u32 a, u32 b, u32 from, u32 count) {
    from &= 255, count &= 255;
    const u32 mask = shl(~shl(~0u, count), from);
    return (b & ~mask) | (shl(a, from) & mask);
}

// ---- floats

inline f32 f32_of(u32 bits) { return as<f32>(bits); }
inline f64 f64_of(u64 bits) { return as<f64>(bits); }

/// Of NaN and a number, the number.
template <class T>
inline T larger(T a, T b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
inline f32 saturated(f32 x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }

/// The largest f32 that is not above `high + low`, an exact sum of two f64.
inline f32 rounded_down(f64 high, f64 low) {
    f32 x = f32(high);
    if (std::isfinite(x) && (f64(x) - high > low)) x = std::nextafter(x, -INFINITY);
    return x;
}
/// a·b + c, rounded down.
inline f32 fma_down(f32 a, f32 b, f32 c) {
    const f64 ab = f64(a) * f64(b), sum = ab + f64(c);
    if (!std::isfinite(sum)) return f32(sum);
    const f64 part = sum - ab;
    return rounded_down(sum, (ab - (sum - part)) + (f64(c) - part));
}

inline f32 flushed(f32 x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

/// `exact`, wrong by up to `units` of its last place in a direction that `seed` decides.
inline f32 approximate(f64 exact, int units, u32 seed) {
    f32 x = f32(exact);
    seed = (seed ^ seed >> 15) * 0x2c1b3c6du;
    seed = (seed ^ seed >> 12) * 0x297a2d39u;
    const int direction = int((seed ^ seed >> 15) % 3) - 1;
    for (int i = 0; i < units && direction != 0 && std::isnormal(x); i++) {
        x = std::nextafter(x, direction > 0 ? INFINITY : -INFINITY);
    }
    return x;
}
/// ex2.approx.ftz: within 2^-22 of it, relatively: two units of the last place at most.
inline f32 exp2_approximate(f32 x) {
    x = flushed(x);
    if (x == 0.0f) return 1.0f;
    return flushed(approximate(std::exp2(f64(x)), 2, as<u32>(x)));
}
/// rcp.approx.ftz: a unit of the last place.
inline f32 reciprocal_approximate(f32 x) {
    return flushed(approximate(1.0 / f64(flushed(x)), 1, as<u32>(x)));
}
/// div.approx: two units of the last place for divisors up to 2^126, zero (or NaN) for larger ones.
inline f32 quotient_approximate(f32 a, f32 b) {
    if (std::fabs(b) > 0x1p126f && std::isfinite(b)) {
        return std::isinf(a) || std::isnan(a) ? NAN : std::copysign(0.0f, a * std::copysign(1.0f, b));
    }
    return approximate(f64(a) / f64(b), 2, as<u32>(a) ^ as<u32>(b));
}

inline u16 bf16_of(f32 x) {
    if (std::isnan(x)) return 0x7fff;
    const u32 bits = as<u32>(x), cut = bits & 0xffff;
    u32 high = bits >> 16;
    if (cut > 0x8000 || (cut == 0x8000 && (high & 1))) high++;
    return u16(high);
}
/// cvt.rn.bf16x2: the first operand goes to the upper half.
inline u32 bf16x2_of(f32 upper, f32 lower) { return u32(bf16_of(upper)) << 16 | bf16_of(lower); }

// ---- of a warp and a block

/// Every instruction is a meeting of its own.
inline void barrier(int line) {
    emulator::block->wait(emulator::State::AtBlockBarrier, 0, line);
}
inline void warp_barrier(u32 lanes, int line) {
    emulator::block->wait(emulator::State::AtWarpBarrier, lanes, 2 * line);
    if (lanes == ~0u) emulator::block->fiber().syncs++;
}
inline u32 shuffle(u32 value, int source, u32 clamp_and_segment, u32 lanes, int line) {
    if (clamp_and_segment != 31) fail(line, "a shuffle of segments");
    if (source < 0 || source > 31 || !(lanes >> source & 1)) {
        fail(line, "a shuffle reads a lane that does not take part");
    }
    return emulator::collective(
        lanes, line, [&](emulator::Slot& slot) { slot.words[0] = value; },
        [&](const emulator::Slot* slots) { return slots[source].words[0]; });
}
inline u32 shuffle_bfly(u32 value, u32 mask, u32 clamp_and_segment, u32 lanes, int line) {
    return shuffle(value, emulator::block->lane() ^ int(mask), clamp_and_segment, lanes, line);
}
inline u32 shuffle_idx(u32 value, u32 index, u32 clamp_and_segment, u32 lanes, int line) {
    return shuffle(value, int(index & 31), clamp_and_segment, lanes, line);
}

struct Fragment {
    u32 words[4];
};
struct HalfFragment {
    u32 words[2];
};

/// ldmatrix .x4 of 8×8 matrices of 16 bits: lanes 8i to 8i + 7 give the rows of matrix i; a lane gets
/// of each matrix elements 2·(lane % 4) and the next of row lane / 4, or of column, when transposed.
inline Fragment load_matrices(u32 row, bool transposed, size_t fixed, int line) {
    const char* start = shared(Access::Read, row, 16, fixed, line);
    const int lane = emulator::block->lane();
    return emulator::collective(
        ~0u, line, [&](emulator::Slot& slot) { slot.pointer = start; },
        [&](const emulator::Slot* slots) {
            Fragment fragment;
            for (int matrix = 0; matrix < 4; matrix++) {
                const auto element = [&](int i) {
                    const int along = 2 * (lane % 4) + i, across = lane / 4;
                    const int r = transposed ? along : across, c = transposed ? across : along;
                    const void* from = slots[8 * matrix + r].pointer;
                    return u32(load<u16>(static_cast<const char*>(from) + 2 * c));
                };
                fragment.words[matrix] = element(0) | element(1) << 16;
            }
            return fragment;
        },
        false);
}

struct Sums {
    f32 elements[4];
};

/// One half of a word, as f32.
inline f32 bf16_in(u32 word, int half) { return as<f32>(half ? word & 0xffff0000u : word << 16); }

/// Towards zero.
inline f32 cut(f64 exact) {
    const f32 x = f32(exact);
    return std::isfinite(x) && std::fabs(f64(x)) > std::fabs(exact) ? std::nextafter(x, 0.0f) : x;
}

/// mma.m16n8k16: D = A·B + C. With group = lane / 4 and member = lane % 4, and i the index of an
/// element in a lane's registers:
///   A: row group for i in 0, 1, 4, 5, else group + 8; column 2·member + i % 2, + 8 for i ≥ 4
///   B: row 2·member + i % 2, + 8 for i ≥ 2; column group
///   C: row group for i < 2, else group + 8; column 2·member + i % 2
inline Sums multiply_matrices(const Fragment& a, const HalfFragment& b, const Sums& c, int line) {
    return emulator::collective(
        ~0u, line,
        [&](emulator::Slot& slot) {
            for (int i = 0; i < 4; i++) slot.words[i] = a.words[i];
            for (int i = 0; i < 2; i++) slot.words[4 + i] = b.words[i];
        },
        [&](const emulator::Slot* slots) {
            const auto element_of_a = [&](int row, int column) {
                const int lane = row % 8 * 4 + column % 8 / 2;
                const int i = 4 * (column / 8) + 2 * (row / 8) + column % 2;
                return f64(bf16_in(slots[lane].words[i / 2], i % 2));
            };
            const auto element_of_b = [&](int row, int column) {
                const int lane = column * 4 + row % 8 / 2;
                const int i = 2 * (row / 8) + row % 2;
                return f64(bf16_in(slots[lane].words[4 + i / 2], i % 2));
            };
            const int group = emulator::block->lane() / 4, member = emulator::block->lane() % 4;
            Sums d;
            for (int i = 0; i < 4; i++) {
                const int row = i < 2 ? group : group + 8, column = 2 * member + i % 2;
                f64 sum = c.elements[i];
                for (int k = 0; k < 16; k++) sum += element_of_a(row, k) * element_of_b(k, column);
                d.elements[i] = cut(sum);
            }
            return d;
        });
}

}  // namespace ptx
