// The driver and cuBLAS of a machine without a GPU: the functions that Nibble calls, with the emulated
// kernels behind cuLaunchKernel. As strict as the documentation allows, and as late: what is queued on
// a stream runs when somebody waits for it, so memory that is changed or freed too early is noticed.
// NIBBLE_EMULATED_BYTES is the memory of the device (1 GiB), NIBBLE_EMULATED_CONTEXT_BYTES what a context
// takes of it (nothing), NIBBLE_EMULATED_MOST_DOWNLOAD the most bytes that are copied to memory that is not
// pinned; with NIBBLE_EMULATED_FAULT products are a tenth too large. NIBBLE_EMULATED_SHORTAGE, such as
// launch:700 or product:30, is the call that finds no memory; how many there were is written to the file
// NIBBLE_EMULATED_CALLS. With NIBBLE_EMULATED_EAGER it has to be asked to load kernels when they are used. What
// only a bug does ends the process.
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator.hpp"

extern "C" void nibble_memory(const emulator::Range*, size_t, int);
extern "C" int nibble_launch(const char*, const unsigned[3], const unsigned[3], size_t, void**);
extern "C" const char* nibble_signature(const char*);

namespace {

// cuda.h
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, UNAVAILABLE = 46;
constexpr int INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_PTX = 218;
constexpr int INVALID_HANDLE = 400, NOT_FOUND = 500;
// cublas_api.h
constexpr int BLAS_NOT_INITIALIZED = 1, BLAS_ALLOC_FAILED = 3, BLAS_INVALID_VALUE = 7, BLAS_NOT_SUPPORTED = 15;

using Address = uint64_t;
std::recursive_mutex lock;
#define ONE_AT_A_TIME std::lock_guard<std::recursive_mutex> guard(lock)

[[noreturn]] void bug(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emulated driver: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    abort();
}

// ---------------------------------------------------------------- memory

struct Memory {
    std::map<Address, size_t> pieces;

    void* add(size_t bytes) {
        const size_t padded = (bytes + 511) / 512 * 512;
        void* start = aligned_alloc(512, padded);
        memset(start, 0xff, padded);  // NaN in every type
        pieces[Address(start)] = bytes;
        return start;
    }
    bool holds(Address start, size_t bytes) const {
        auto after = pieces.upper_bound(start);
        if (after == pieces.begin()) return false;
        const auto& piece = *std::prev(after);
        return start + bytes <= piece.first + piece.second;
    }
    size_t bytes() const {
        size_t sum = 0;
        for (const auto& piece : pieces) sum += piece.second;
        return sum;
    }
};
Memory device, pinned;

size_t number(const char* variable, size_t otherwise) {
    const char* text = getenv(variable);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}
size_t device_bytes() { return number("NIBBLE_EMULATED_BYTES", size_t(1) << 30); }

void inside(const Memory& memory, Address start, size_t bytes, const char* what) {
    if (!memory.holds(start, bytes)) bug("%s: %zu bytes at %#lx", what, bytes, (unsigned long)start);
}

/// Calls of a kind that may find no memory.
struct Calls {
    const char* kind;
    size_t count = 0;

    bool find_no_memory() {
        const char* shortage = getenv("NIBBLE_EMULATED_SHORTAGE");
        count++;
        return shortage && kind + (":" + std::to_string(count)) == shortage;
    }
};
Calls launches = {"launch"}, products = {"product"};

/// Writes them down at the end.
struct CallCounts {
    ~CallCounts() {
        const char* path = getenv("NIBBLE_EMULATED_CALLS");
        FILE* file = path ? fopen(path, "w") : nullptr;
        if (!file) return;
        for (const Calls* calls : {&launches, &products}) fprintf(file, "%s %zu\n", calls->kind, calls->count);
        fclose(file);
    }
} call_counts;

// ---------------------------------------------------------------- streams

using Work = std::function<void()>;
struct Stream {
    std::deque<Work> queue;
    uint64_t done = 0, queued = 0;
};
/// The first `count` pieces of work of a stream.
struct Event {
    Stream* stream = nullptr;
    uint64_t count = 0;
};
std::map<void*, std::unique_ptr<Stream>> streams;
std::map<void*, std::unique_ptr<Event>> events;

void run(Stream& stream, uint64_t count) {
    while (stream.done < count) {
        Work work = std::move(stream.queue.front());
        stream.queue.pop_front();
        stream.done++;
        work();
    }
}
void run_all() {
    for (auto& stream : streams) run(*stream.second, stream.second->queued);
}
int queue(void* handle, Work work) {
    auto stream = streams.find(handle);
    if (stream == streams.end()) return INVALID_HANDLE;
    stream->second->queue.push_back(std::move(work));
    stream->second->queued++;
    return SUCCESS;
}

// ---------------------------------------------------------------- contexts and functions

bool initialised = false;
int retained = 0;
char context_object;
void* const CONTEXT = &context_object;
thread_local void* current = nullptr;

/// Of the device, whoever uses them.
size_t used_bytes() {
    return device.bytes() + (retained > 0 ? number("NIBBLE_EMULATED_CONTEXT_BYTES", 0) : 0);
}

#define IN_CONTEXT            \
    ONE_AT_A_TIME;            \
    if (current != CONTEXT || retained == 0) return INVALID_CONTEXT

/// What a block of compute capability 8.6 may have.
constexpr int SHARED_BYTES = 99 << 10;
struct Function {
    std::string name;
    size_t dynamic_shared = 48 << 10;
};
std::map<void*, std::unique_ptr<Function>> functions;

/// What a kernel may touch now.
std::vector<emulator::Range> kernel_memory() {
    std::vector<emulator::Range> ranges;
    for (const Memory* memory : {&device, &pinned}) {
        for (const auto& [start, bytes] : memory->pieces) ranges.push_back({start, start + bytes, true});
    }
    return ranges;
}

/// The arguments of a launch, copied as the driver does.
std::vector<std::vector<char>> copied(const char* signature, void** arguments) {
    std::vector<std::vector<char>> all;
    for (; *signature; signature++, arguments++) {
        const size_t bytes = *signature == 'i' || *signature == 'f' ? 4 : 8;
        const char* from = static_cast<const char*>(*arguments);
        all.emplace_back(from, from + bytes);
    }
    return all;
}

// ---------------------------------------------------------------- products

constexpr int F32 = 0, BF16 = 14, COMPUTE_F32 = 68, DISALLOW_REDUCED_PRECISION = 16;

float widened(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Blas {
    void* stream = nullptr;
    bool has_workspace = false;
    int math_mode = 0;
};
std::map<void*, std::unique_ptr<Blas>> handles;

/// Bytes, up to 16.
long alignment(const void* address) { return std::min(16L, long(address) & -long(address)); }

/// A column-major operand `[rows, columns]`, or stored as its transpose.
struct Matrix {
    const uint16_t* start;
    long stride;
    bool transposed;

    long span(long rows, long columns) const {
        return transposed ? (rows - 1) * stride + columns : (columns - 1) * stride + rows;
    }
    long kind() const { return 2 * stride + alignment(start) + transposed; }
    float at(long row, long column) const {
        return widened(start[transposed ? column + row * stride : row + column * stride]);
    }
};

const bool faulty = getenv("NIBBLE_EMULATED_FAULT") != nullptr;

struct Product {
    long m, n, k;
    float alpha, beta;
    Matrix a, b;
    void* c;
    int type;
    long stride;

    long size() const { return type == F32 ? 4 : 2; }
    void check() const {
        inside(device, Address(a.start), 2 * a.span(m, k), "left operand");
        inside(device, Address(b.start), 2 * b.span(k, n), "right operand");
        inside(device, Address(c), size() * ((n - 1) * stride + m), "product");
    }
    void run() const {
        std::vector<float> left(m * k), sums(m);
        for (long p = 0; p < k; p++) {
            for (long i = 0; i < m; i++) left[p * m + i] = a.at(i, p);
        }
        // A library has kernels for shapes, strides and alignments, and each sums in an order of its own.
        const long begin = (31 * m + 17 * n + 7 * k + 13 * a.kind() + 11 * b.kind()
                            + 5 * (stride + alignment(c))) % k;
        for (long j = 0; j < n; j++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (long step = 0; step < k; step++) {
                const long p = (begin + step) % k;
                const float factor = b.at(p, j);
                for (long i = 0; i < m; i++) sums[i] += left[p * m + i] * factor;
            }
            for (long i = 0; i < m; i++) {
                float* wide = static_cast<float*>(c) + j * stride + i;
                uint16_t* half = static_cast<uint16_t*>(c) + j * stride + i;
                float value = alpha * sums[i] * (faulty ? 1.1f : 1.0f);
                if (beta != 0) value += beta * (type == F32 ? *wide : widened(*half));
                if (type == F32) *wide = value;
                else *half = rounded(value);
            }
        }
    }
};

}  // namespace

extern "C" {

// ---------------------------------------------------------------- libcuda

int cuInit(unsigned flags) {
    const char* loading = getenv("CUDA_MODULE_LOADING");
    const bool lazy = loading && !strcmp(loading, "LAZY");
    initialised = flags == 0 && (lazy || !getenv("NIBBLE_EMULATED_EAGER"));
    return initialised ? SUCCESS : INVALID_VALUE;
}
int cuDriverGetVersion(int* version) { return *version = 12080, SUCCESS; }
// The second device is another process' alone.
int cuDeviceGetCount(int* count) {
    *count = 2;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}
int cuDeviceGet(int* handle, int index) {
    *handle = index;
    return !initialised ? NOT_INITIALIZED : index < 2 ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "Emulated GPU");
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = device_bytes(), SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75   ? 8
             : attribute == 76 ? 9
             : attribute == 16 ? 128
             : attribute == 17 ? 0
             : attribute == 97 ? SHARED_BYTES
                               : -1;
    return *value < 0 ? INVALID_VALUE : SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    ONE_AT_A_TIME;
    if (device != 0) return UNAVAILABLE;
    retained++;
    return *context = CONTEXT, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    ONE_AT_A_TIME;
    if (--retained < 0) bug("a context that nobody has is released");
    return SUCCESS;
}
int cuCtxSetCurrent(void* context) {
    if (context && context != CONTEXT) return INVALID_CONTEXT;
    return current = context, SUCCESS;
}
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    IN_CONTEXT;
    *total = device_bytes();
    return *free = *total - std::min(*total, used_bytes()), SUCCESS;
}
int cuMemAlloc_v2(Address* address, size_t bytes) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    if (used_bytes() + bytes > device_bytes()) return OUT_OF_MEMORY;
    return *address = Address(device.add(bytes)), SUCCESS;
}
int cuMemFree_v2(Address address) {
    IN_CONTEXT;
    run_all();
    if (!device.pieces.erase(address)) return INVALID_VALUE;
    free(reinterpret_cast<void*>(address));
    return SUCCESS;
}
int cuMemHostAlloc(void** start, size_t bytes, unsigned) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    return *start = pinned.add(bytes), SUCCESS;
}
int cuMemFreeHost(void* start) {
    IN_CONTEXT;
    for (const auto& stream : streams) {
        if (stream.second->done != stream.second->queued) bug("pinned memory is freed at work");
    }
    if (!pinned.pieces.erase(Address(start))) return INVALID_VALUE;
    free(start);
    return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    inside(device, to, bytes, "copy to the GPU");
    if (pinned.holds(Address(from), bytes)) {
        return queue(stream, [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
    }
    // Other memory is read before the call returns.
    const char* start = static_cast<const char*>(from);
    auto values = std::make_shared<std::vector<char>>(start, start + bytes);
    return queue(stream, [=] { memcpy(reinterpret_cast<void*>(to), values->data(), bytes); });
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    inside(device, from, bytes, "copy from the GPU");
    const size_t most = number("NIBBLE_EMULATED_MOST_DOWNLOAD", SIZE_MAX);
    if (bytes > most && !pinned.holds(Address(to), bytes)) bug("%zu bytes are copied at once", bytes);
    return queue(stream, [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    inside(device, from, bytes, "copy from");
    inside(device, to, bytes, "copy to");
    if (from < to + bytes && to < from + bytes) bug("a copy of %zu bytes overlaps itself", bytes);
    return queue(stream, [=] {
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    });
}
int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
    IN_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    inside(device, to, bytes, "fill");
    return queue(stream, [=] { memset(reinterpret_cast<void*>(to), value, bytes); });
}
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    IN_CONTEXT;
    return *least = 0, *greatest = -5, SUCCESS;
}
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    IN_CONTEXT;
    if (flags != 1) bug("a stream that waits for the default stream");
    if (priority > 0 || priority < -5) bug("a stream of priority %d", priority);
    auto made = std::make_unique<Stream>();
    *stream = made.get();
    streams[*stream] = std::move(made);
    return SUCCESS;
}
int cuStreamDestroy_v2(void* stream) {
    IN_CONTEXT;
    auto found = streams.find(stream);
    if (found == streams.end()) return INVALID_HANDLE;
    run_all();
    streams.erase(found);
    return SUCCESS;
}
int cuStreamSynchronize(void* stream) {
    IN_CONTEXT;
    auto found = streams.find(stream);
    if (found == streams.end()) return INVALID_HANDLE;
    run(*found->second, found->second->queued);
    return SUCCESS;
}
int cuEventCreate(void** event, unsigned) {
    IN_CONTEXT;
    auto made = std::make_unique<Event>();
    *event = made.get();
    events[*event] = std::move(made);
    return SUCCESS;
}
int cuEventDestroy_v2(void* event) {
    IN_CONTEXT;
    return events.erase(event) ? SUCCESS : INVALID_HANDLE;
}
int cuEventRecord(void* event, void* stream) {
    IN_CONTEXT;
    auto found = streams.find(stream);
    if (!events.count(event) || found == streams.end()) return INVALID_HANDLE;
    *events[event] = {found->second.get(), found->second->queued};
    return SUCCESS;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
    IN_CONTEXT;
    if (!events.count(event)) return INVALID_HANDLE;
    const Event awaited = *events[event];  // as it is now, whatever is recorded later
    return queue(stream, [=] {
        if (awaited.stream) run(*awaited.stream, awaited.count);
    });
}
int cuEventSynchronize(void* event) {
    IN_CONTEXT;
    if (!events.count(event)) return INVALID_HANDLE;
    const Event awaited = *events[event];
    if (awaited.stream) run(*awaited.stream, awaited.count);
    return SUCCESS;
}
int cuModuleLoadDataEx(void** module, const void* ptx, unsigned count, int* options, void** values) {
    IN_CONTEXT;
    *module = CONTEXT;
    if (count != 2 || options[0] != 5 || options[1] != 6) return INVALID_VALUE;
    const bool known = strstr(static_cast<const char*>(ptx), ".target sm_80") && !getenv("NIBBLE_EMULATED_OLD");
    if (!known) snprintf(static_cast<char*>(values[0]), size_t(values[1]), "ptxas: line 1: too new\n");
    return known ? SUCCESS : INVALID_PTX;
}
int cuModuleUnload(void* module) {
    IN_CONTEXT;
    return module == CONTEXT ? SUCCESS : INVALID_HANDLE;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    IN_CONTEXT;
    if (module != CONTEXT || !nibble_signature(name)) return NOT_FOUND;
    auto made = std::make_unique<Function>();
    made->name = name;
    *function = made.get();
    functions[*function] = std::move(made);
    return SUCCESS;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    IN_CONTEXT;
    auto found = functions.find(function);
    if (found == functions.end()) return INVALID_HANDLE;
    if (attribute == 9) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;
    if (attribute != 8 || value > SHARED_BYTES) return INVALID_VALUE;
    found->second->dynamic_shared = value;
    return SUCCESS;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
    IN_CONTEXT;
    auto found = functions.find(function);
    if (found == functions.end()) return INVALID_HANDLE;
    if (shared > found->second->dynamic_shared || extra) return INVALID_VALUE;
    if (launches.find_no_memory()) return OUT_OF_MEMORY;
    const std::string name = found->second->name;
    auto values = copied(nibble_signature(name.c_str()), arguments);
    return queue(stream, [=]() mutable {
        std::vector<void*> addresses;
        for (auto& value : values) addresses.push_back(value.data());
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        const auto ranges = kernel_memory();
        nibble_memory(ranges.data(), ranges.size(), 0);
        const int status = nibble_launch(name.c_str(), grid, block, shared, addresses.data());
        if (status != 0) bug("%s does not take %u blocks of %u threads", name.c_str(), gx, bx);
    });
}
int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == INVALID_VALUE ? "invalid argument"
                                                                              : nullptr;
    return SUCCESS;
}

// ---------------------------------------------------------------- libcublas

int cublasCreate_v2(void** handle) {
    ONE_AT_A_TIME;
    if (current != CONTEXT) return BLAS_NOT_INITIALIZED;
    auto made = std::make_unique<Blas>();
    *handle = made.get();
    handles[*handle] = std::move(made);
    return SUCCESS;
}
int cublasGetVersion_v2(void*, int* version) { return *version = 120800, SUCCESS; }
int cublasDestroy_v2(void* handle) {
    ONE_AT_A_TIME;
    return handles.erase(handle) ? SUCCESS : BLAS_NOT_INITIALIZED;
}
int cublasSetStream_v2(void* handle, void* stream) {
    ONE_AT_A_TIME;
    // Takes the workspace away, too.
    const int mode = handles[handle]->math_mode;
    *handles[handle] = {stream, false, mode};
    return streams.count(stream) ? SUCCESS : BLAS_INVALID_VALUE;
}
int cublasSetMathMode(void* handle, int mode) {
    ONE_AT_A_TIME;
    return handles[handle]->math_mode = mode, SUCCESS;
}
int cublasSetWorkspace_v2(void* handle, void* start, size_t bytes) {
    ONE_AT_A_TIME;
    inside(device, Address(start), bytes, "cuBLAS' workspace");
    if (Address(start) % 256 != 0) return BLAS_INVALID_VALUE;
    return handles[handle]->has_workspace = true, SUCCESS;
}
int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                               const void* alpha, const void* a, int type_a, int lda,
                               long long stride_a, const void* b, int type_b, int ldb,
                               long long stride_b, const void* beta, void* c, int type_c, int ldc,
                               long long stride_c, int batches, int compute, int algorithm) {
    ONE_AT_A_TIME;
    Blas& blas = *handles[handle];
    if (current != CONTEXT) bug("cuBLAS without a context");
    if (!blas.has_workspace) bug("cuBLAS would allocate a workspace");
    if (blas.math_mode != DISALLOW_REDUCED_PRECISION) bug("cuBLAS would add in bf16");
    if (type_a != BF16 || type_b != BF16 || (type_c != BF16 && type_c != F32) ||
        compute != COMPUTE_F32 || algorithm != -1) {
        return BLAS_NOT_SUPPORTED;
    }
    const bool sizes = m > 0 && n > 0 && k > 0 && batches > 0;
    const bool strides = lda >= (transpose_a ? k : m) && ldb >= (transpose_b ? n : k) && ldc >= m;
    if (!sizes || !strides || transpose_a > 1 || transpose_b > 1) return BLAS_INVALID_VALUE;
    if (products.find_no_memory()) return BLAS_ALLOC_FAILED;
    for (int batch = 0; batch < batches; batch++) {
        const auto* left = static_cast<const uint16_t*>(a) + batch * stride_a;
        const auto* right = static_cast<const uint16_t*>(b) + batch * stride_b;
        Product product = {m,
                           n,
                           k,
                           *static_cast<const float*>(alpha),
                           *static_cast<const float*>(beta),
                           {left, lda, transpose_a == 1},
                           {right, ldb, transpose_b == 1},
                           c,
                           type_c,
                           ldc};
        product.c = static_cast<char*>(c) + batch * stride_c * product.size();
        product.check();
        if (int code = queue(blas.stream, [=] { product.run(); })) return code;
    }
    return SUCCESS;
}
int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                 const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                 int ldb, const void* beta, void* c, int type_c, int ldc, int compute,
                 int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transpose_a, transpose_b, m, n, k, alpha, a, type_a, lda,
                                      0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute,
                                      algorithm);
}

}  // extern "C"
