// Runs kernels as `emulate.h` says: fibers, barriers, fragments of a warp, and the entry for launches.
#define EMULATOR
#include "emulate.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace emulate {

thread_local Block block;

Kernel*& Kernel::first() {
    static Kernel* first = nullptr;
    return first;
}

static constexpr size_t STACK = 128 * 1024;

// Saves what a function must keep, changes stacks, and takes up the other. Void under the System V rules of x86-64 and AArch64.
extern "C" void emulate_switch(void** from, void* to);
#if defined(__x86_64__)
static constexpr int SAVED = 6;
__asm__(R"(
.text
.globl emulate_switch
.type emulate_switch,@function
emulate_switch:
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
.size emulate_switch, .-emulate_switch
)");
/// A stack on which `emulate_switch` begins `entry`.
static void* prepare(char* stack, void (*entry)()) {
    uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + STACK);
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < SAVED; i++) *--top = 0;
    return top;
}
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl emulate_switch
.type emulate_switch,@function
emulate_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
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
  ldp x19, x20, [sp, #0]
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
.size emulate_switch, .-emulate_switch
)");
static void* prepare(char* stack, void (*entry)()) {
    uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + STACK - 160);
    std::fill(top, top + 20, 0);
    top[11] = reinterpret_cast<uintptr_t>(entry);
    return top;
}
#else
#error "fibers are written for x86-64 and AArch64"
#endif

static void yield() { emulate_switch(&block.running->stack_pointer, block.scheduler); }

void fail(const char* what) {
    const Fiber* fiber = block.running;
    fprintf(stderr, "emulated kernel: %s (block %u,%u,%u, thread %u, %s)\n", what, block.index.x, block.index.y,
            block.index.z, fiber->index, fiber->line);
    abort();
}

void meet_block(const char* line) {
    block.running->line = line;
    block.progress = true;
    const uint64_t generation = block.generation;
    if (++block.arrived == block.threads) {
        block.arrived = 0;
        block.generation++;
        return;
    }
    while (block.generation == generation) yield();
}

void meet_warp(uint32_t mask, const char* line) {
    Fiber* fiber = block.running;
    Warp* warp = fiber->warp;
    fiber->line = line;
    mask &= warp->lanes;
    if (!(mask >> fiber->lane & 1)) fail("a lane is not in its own mask");
    const uint64_t generation = warp->generation;
    warp->arrived |= 1u << fiber->lane;
    warp->lines[fiber->lane] = line;
    block.progress = true;
    if ((warp->arrived & mask) == mask) {
        for (int lane = 0; lane < 32; lane++) {
            if ((mask >> lane & 1) && strcmp(warp->lines[lane], line)) fail("lanes of a warp meet in different lines");
        }
        warp->arrived = 0;
        warp->generation++;
        return;
    }
    while (warp->generation == generation) yield();
}

unsigned ballot(uint32_t mask, bool value, const char* line) {
    Warp* warp = block.running->warp;
    warp->slots[lane()] = value;
    meet_warp(mask, line);
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (mask & warp->lanes & 1u << lane) result |= (unsigned)warp->slots[lane] << lane;
    }
    meet_warp(mask, line);
    return result;
}

void begin_copy(void* to, const void* from, bool valid) {
    Fiber* fiber = block.running;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) fail("a copy of 16 bytes is misaligned");
    if (fiber->copy_count == 512) fail("more copies than are kept track of");
    fiber->copies[fiber->copy_count++] = {to, from, valid};
    memset(to, 0xff, 16);
}

void end_copies() {
    Fiber* fiber = block.running;
    if (fiber->group_count == 64) fail("more groups of copies than are kept track of");
    fiber->group_ends[fiber->group_count++] = fiber->copy_count;
}

void await_copies(int left) {
    Fiber* fiber = block.running;
    const int groups = fiber->group_count - left;
    if (groups <= 0) return;
    const int end = fiber->group_ends[groups - 1];
    for (int i = 0; i < end; i++) {
        const PendingCopy& copy = fiber->copies[i];
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    fiber->is_unpublished |= end > 0;
    std::copy(fiber->copies + end, fiber->copies + fiber->copy_count, fiber->copies);
    fiber->copy_count -= end;
    for (int i = groups; i < fiber->group_count; i++) fiber->group_ends[i - groups] = fiber->group_ends[i] - end;
    fiber->group_count = left;
}

void read_matrices(uint32_t (&out)[4], const void* row, bool transposed, const char* line) {
    Warp* warp = block.running->warp;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix is misaligned");
    warp->rows[lane()] = row;
    meet_warp(0xffffffffu, line);
    const unsigned group = lane() / 4, pair = lane() % 4 * 2;
    for (int matrix = 0; matrix < 4; matrix++) {
        auto at = [&](unsigned row, unsigned column) {
            return (uint32_t) static_cast<const uint16_t*>(warp->rows[8 * matrix + row])[column];
        };
        out[matrix] = transposed ? at(pair, group) | at(pair + 1, group) << 16 : at(group, pair) | at(group, pair + 1) << 16;
    }
    meet_warp(0xffffffffu, line);
}

void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool eight_bits, const char* line) {
    Warp* warp = block.running->warp;
    std::copy(a, a + 4, warp->fragments[lane()]);
    warp->fragments[lane()][4] = b0;
    warp->fragments[lane()][5] = b1;
    meet_warp(0xffffffffu, line);
    // A register has numbers of `each` neighbouring k; four lanes side by side have half of all.
    const unsigned each = eight_bits ? 4 : 2, half = 4 * each;
    const auto number = [&](uint32_t bits, unsigned at) {
        return eight_bits ? to_float(fp8{(uint8_t)(bits >> 8 * at)}) : to_float(bf16{(uint16_t)(bits >> 16 * at)});
    };
    for (int i = 0; i < 4; i++) {
        const unsigned row = lane() / 4 + (i >= 2 ? 8 : 0), column = lane() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 2 * half; k++) {
            const unsigned holds_a = row % 8 * 4 + k % half / each, holds_b = column * 4 + k % half / each;
            const uint32_t from_a = warp->fragments[holds_a][(row >= 8) + (k >= half) * 2];
            const uint32_t from_b = warp->fragments[holds_b][4 + (k >= half)];
            d[i] += number(from_a, k % each) * number(from_b, k % each);
        }
    }
    meet_warp(0xffffffffu, line);
}

/// A product of a warpgroup that is under way: one thread's part of it.
struct Product {
    float (*d)[4];
    int count;
    /// Of the four lanes that have this one's rows.
    uint32_t a[4][4];
    uint64_t matrix;
    bool across, fresh;
    /// What lay there when it began, one copy a warp.
    std::shared_ptr<const std::vector<uint16_t>> b;
};
/// Sums that nobody may look at, as they were.
struct Sums {
    float (*d)[4];
    std::vector<float> were;
};
struct Products {
    std::vector<Product> all;
    std::vector<Sums> sums;
};
/// By thread of the block.
static std::vector<Products> products;
/// All threads of the block.
static std::vector<Fiber>* crew;
/// By warp: the factor of the product that begins.
static std::vector<std::shared_ptr<const std::vector<uint16_t>>> factors;

/// Shared memory begins somewhere: not at a multiple of what kernels may want it to.
static constexpr uint32_t SHARED_BEGIN = 128;

uint32_t shared_address(const void* at) {
    return (uint32_t)(static_cast<const char*>(at) - block.dynamic_shared) + SHARED_BEGIN;
}

void publish() { block.running->is_unpublished = false; }

void make_ready(const char* line) {
    meet_warp(0xffffffffu, line);
    block.running->is_ready = true;
}

/// A box that is under way.
struct Box {
    char* to;
    Table table;
    int row, column;
};
/// What has been said of arrivals, and what is on its way to them.
struct Expected {
    const Arrivals* arrivals;
    uint64_t turn;
    bool is_said;
    int bytes;
    std::vector<Box> boxes;
};
/// Of the block.
static std::vector<Expected> expected;
/// Numbers of a row of a box: the widest whose pieces can be swapped.
static constexpr int BOX_COLUMNS = 64;
/// What `Card::table` of the emulated card writes.
static constexpr uint64_t TABLE_MAGIC = 0x7461626c65;

static Expected& expected_of(const Arrivals* arrivals) {
    for (Expected& one : expected) {
        if (one.arrivals == arrivals) return one;
    }
    fail("arrivals are used before they begin");
}

void begin_arrivals(Arrivals* arrivals) {
    if (reinterpret_cast<uintptr_t>(arrivals) % 8) fail("arrivals are misaligned");
    expected.push_back({arrivals, 0, false, 0, {}});
}

void expect_arrivals(Arrivals* arrivals, int bytes) {
    Expected& one = expected_of(arrivals);
    if (one.is_said) fail("bytes are expected twice");
    one.is_said = true;
    one.bytes = bytes;
}

/// Calls `each` with the places of a box in shared memory and in the table, 16 bytes each; null where the table has nothing.
template <class Each>
static void pieces_of(const Box& box, Each each) {
    const uint32_t begin = shared_address(box.to);
    for (int row = 0; row < (int)box.table.box_rows; row++) {
        for (int piece = 0; piece < BOX_COLUMNS / 8; piece++) {
            uint32_t at = begin + row * BOX_COLUMNS * 2 + piece * 16;
            at ^= (at >> 7 & 7) << 4;
            const int64_t from_row = box.row + row, from_column = box.column + piece * 8;
            const bool is_there = from_row >= 0 && from_row < (int64_t)box.table.rows && from_column < (int64_t)box.table.columns;
            const auto* from = reinterpret_cast<const uint16_t*>(box.table.address) + from_row * box.table.columns + from_column;
            each(block.dynamic_shared + at - SHARED_BEGIN, is_there ? from : nullptr);
        }
    }
}

void begin_box(void* to, const Table* table, int row, int column, Arrivals* arrivals) {
    if (table->magic != TABLE_MAGIC) fail("a box of something that is no table");
    if (shared_address(to) % 1024) fail("a box is misaligned");
    const Box box = {static_cast<char*>(to), *table, row, column};
    pieces_of(box, [](char* to, const uint16_t*) { memset(to, 0xff, 16); });
    expected_of(arrivals).boxes.push_back(box);
}

void await_arrivals(Arrivals* arrivals, int parity, const char* line) {
    block.running->line = line;
    while ((int)(expected_of(arrivals).turn & 1) == parity) {
        Expected& one = expected_of(arrivals);
        int bytes = 0;
        for (const Box& box : one.boxes) bytes += box.table.box_rows * BOX_COLUMNS * 2;
        if (!one.is_said || bytes < one.bytes) {
            yield();
            continue;
        }
        if (bytes > one.bytes) fail("more bytes arrive than are expected");
        for (const Box& box : one.boxes) {
            pieces_of(box, [](char* to, const uint16_t* from) { from ? memcpy(to, from, 16) : memset(to, 0, 16); });
        }
        one.boxes.clear();
        one.is_said = false;
        one.turn++;
        block.progress = true;
    }
}

/// All of a matrix: 16 k, `columns` columns, [column][k].
static std::vector<uint16_t> matrix_of(uint64_t matrix, int columns, bool across) {
    const uint32_t begin = (matrix & 0x3fff) << 4, half = (matrix >> 16 & 0x3fff) << 4, eight = (matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62 != 1) fail("a matrix is not swizzled by 128 bytes");
    std::vector<uint16_t> all(columns * 16);
    for (int column = 0; column < columns; column++) {
        for (int k = 0; k < 16; k++) {
            uint32_t at = across ? begin + column % 64 * 2 + column / 64 * half + k % 8 * 128 + k / 8 * eight
                                 : begin + column % 8 * 128 + column / 8 * eight + k * 2;
            at ^= (at >> 7 & 7) << 4;
            memcpy(&all[column * 16 + k], block.dynamic_shared + at - SHARED_BEGIN, 2);
        }
    }
    return all;
}

void begin_product(float (*d)[4], int count, const uint32_t (&a)[4], uint64_t matrix, bool across, bool fresh, const char* line) {
    Fiber* fiber = block.running;
    Warp* warp = fiber->warp;
    if (!fiber->is_ready) fail("registers of a product are not ready");
    for (const Fiber& other : *crew) {
        if (other.is_unpublished) fail("a product reads what was copied and is not published");
    }
    std::copy(a, a + 4, warp->fragments[lane()]);
    meet_warp(0xffffffffu, line);
    Product product = {d, count, {}, matrix, across, fresh, nullptr};
    for (int i = 0; i < 4; i++) std::copy_n(warp->fragments[lane() / 4 * 4 + i], 4, product.a[i]);
    auto& factor = factors[fiber->index / 32];
    if (lane() == 0) factor = std::make_shared<const std::vector<uint16_t>>(matrix_of(matrix, count * 8, across));
    meet_warp(0xffffffffu, line);
    product.b = factor;
    Products& own = products[fiber->index];
    if (std::none_of(own.sums.begin(), own.sums.end(), [d](const Sums& sums) { return sums.d == d; })) {
        own.sums.push_back({d, std::vector<float>(d[0], d[0] + count * 4)});
        std::fill(d[0], d[0] + count * 4, NAN);
    }
    own.all.push_back(std::move(product));
}

void await_products(const char* line) {
    meet_warp(0xffffffffu, line);
    Fiber* fiber = block.running;
    Products& own = products[fiber->index];
    for (const Product& product : own.all) {
        if (lane() == 0 && matrix_of(product.matrix, product.count * 8, product.across) != *product.b) {
            fail("a product's factors were overwritten");
        }
        Sums& sums = *std::find_if(own.sums.begin(), own.sums.end(), [&](const Sums& sums) { return sums.d == product.d; });
        if (product.fresh) std::fill(sums.were.begin(), sums.were.end(), 0.0f);
        for (int i = 0; i < product.count * 4; i++) {
            const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2, low = i % 4 < 2 ? 0 : 1;
            float sum = sums.were[i];
            for (int k = 0; k < 16; k++) {
                const uint32_t pair = product.a[k % 8 / 2][low + k / 8 * 2];
                sum += to_float(bf16{(uint16_t)(pair >> k % 2 * 16)}) * to_float(bf16{(*product.b)[column * 16 + k]});
            }
            sums.were[i] = sum;
        }
    }
    for (const Sums& sums : own.sums) std::copy(sums.were.begin(), sums.were.end(), sums.d[0]);
    own.all.clear();
    own.sums.clear();
    fiber->is_ready = false;
}

struct Launch {
    const Kernel* kernel;
    void** arguments;
};
static Launch launch;

static void enter() {
    launch.kernel->call(launch.kernel->function, launch.arguments);
    Fiber* fiber = block.running;
    if (!products[fiber->index].all.empty()) fail("a product is not waited for");
    fiber->done = true;
    fiber->line = "its end";
    block.alive--;
    block.progress = true;
    yield();
    abort();
}

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

static void run_block(std::vector<Fiber>& fibers, std::vector<Warp>& warps, const std::vector<unsigned>& order,
                      const std::vector<char*>& stacks, size_t shared_bytes) {
    memset(block.dynamic_shared, 0xff, shared_bytes);
    if (__start_emulated_shared) memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    std::fill(warps.begin(), warps.end(), Warp{});
    const dim3 size = block.block_size;
    for (unsigned i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.stack_pointer = prepare(stacks[i], &enter);
        fiber.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        fiber.index = i;
        fiber.lane = i % 32;
        fiber.warp = &warps[i / 32];
        fiber.warp->lanes |= 1u << fiber.lane;
        fiber.done = false;
        fiber.line = "its beginning";
        fiber.copy_count = fiber.group_count = 0;
        fiber.is_unpublished = fiber.is_ready = false;
    }
    crew = &fibers;
    products.assign(fibers.size(), {});
    factors.assign(warps.size(), {});
    expected.clear();
    while (block.alive) {
        if (!block.progress) {
            const auto stuck = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.done; });
            block.running = &*stuck;
            fail("a barrier is not reached by all threads");
        }
        block.progress = false;
        for (const unsigned at : order) {
            if (fibers[at].done) continue;
            block.running = &fibers[at];
            emulate_switch(&block.scheduler, fibers[at].stack_pointer);
        }
    }
    for (const Expected& one : expected) {
        if (one.is_said || !one.boxes.empty()) fail("a box is not waited for");
    }
}

}  // namespace emulate

using namespace emulate;

/// Runs a kernel over a grid. `seed` decides in which order the threads of a block run: 0 in theirs, 1 backwards, else any.
/// Returns 0; 1: there is no such kernel; 2: it takes another number of arguments.
extern "C" int emulate_launch(const char* name, const unsigned grid[3], const unsigned size[3], size_t shared_bytes,
                              void** arguments, int count, unsigned seed) {
    static std::mutex turn;
    const std::lock_guard<std::mutex> guard(turn);
    const Kernel* kernel = Kernel::first();
    while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
    if (!kernel) return 1;
    if (kernel->arguments != count) return 2;
    launch = {kernel, arguments};
    const unsigned threads = size[0] * size[1] * size[2];
    std::vector<Fiber> fibers(threads);
    std::vector<Warp> warps((threads + 31) / 32);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0);
    if (seed == 1) std::reverse(order.begin(), order.end());
    else if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    std::vector<char*> stacks(threads);
    for (char*& stack : stacks) stack = static_cast<char*>(aligned_alloc(64, STACK));
    char* const shared = static_cast<char*>(aligned_alloc(128, (shared_bytes + 255) / 128 * 128));
    for (unsigned z = 0; z < grid[2]; z++) {
        for (unsigned y = 0; y < grid[1]; y++) {
            for (unsigned x = 0; x < grid[0]; x++) {
                block = Block{};
                block.index = {x, y, z};
                block.block_size = {size[0], size[1], size[2]};
                block.grid_size = {grid[0], grid[1], grid[2]};
                block.threads = block.alive = threads;
                block.dynamic_shared = shared;
                block.progress = true;
                run_block(fibers, warps, order, stacks, shared_bytes);
            }
        }
    }
    for (char* stack : stacks) free(stack);
    free(shared);
    return 0;
}
