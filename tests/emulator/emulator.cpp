// The scheduler of the fibers, what they do together, and the checks of what they read and write.
//
// Warps run in an order that a seed decides, so that what only luck orders comes in many orders.
// Compiled with CHECKED, the sources' accesses (the compiler calls __tsan_* for each) are held
// against the memory that they may touch and, by vector clocks, against those of other threads.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

emulator::Index threadIdx, blockIdx, gridDim;

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
// Saves the registers that a call keeps and goes on at another stack.
void emulator_switch(void** save, void* to);
}
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
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

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr int BARRIERS = 16;
#ifdef CHECKED
constexpr bool IS_CHECKED = true;
#else
constexpr bool IS_CHECKED = false;
#endif

using Clock = std::vector<uint32_t>;

void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

enum class State { READY, WAITING, DONE };

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

struct Thread {
  void* stack_pointer;
  State state;
  std::string waits_for;
  uint32_t words[12];  // brought to a meeting of lanes
  uint32_t result[4];
  std::vector<Copy> copies;
  Clock clock;
};

struct Meeting {
  uint32_t mask, here;
  const char* what;
};

struct Barrier {
  int count = 0;
  std::vector<unsigned> here, waiting;
};

// Who wrote a piece of memory last and who has read it since; threads of one block only.
struct Access {
  int thread;
  uint32_t time;
};
struct Cell {
  unsigned block = ~0u;
  Access write{-1, 0};
  std::vector<Access> reads;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

std::mt19937 order;
std::vector<Range> tensors;
std::string failure;
void* scheduler_stack;
std::vector<Thread> threads;
std::vector<std::vector<Meeting>> meetings;  // of each warp
Barrier barriers[BARRIERS];
std::vector<char> shared;
char* stacks;
unsigned current, block;
void (*thread_body)(void*);
void* thread_closure;
size_t closure_size;
std::unordered_map<uintptr_t, Cell> cells;

[[noreturn]] void go_back(const std::string& why) {
  if (failure.empty()) failure = why;
  void* unused;
  emulator_switch(&unused, scheduler_stack);
  std::abort();
}

std::string name_of(unsigned thread) {
  return "block " + std::to_string(block) + ", thread " + std::to_string(thread);
}

// Where in the library the access under check is.
const void* accessed_by;

[[noreturn]] void fail(const std::string& why) {
  char place[32] = "";
  if (accessed_by != nullptr)
    std::snprintf(place, sizeof place, " (at 0x%zx)",
                  static_cast<size_t>(static_cast<const char*>(accessed_by) - &__ehdr_start));
  go_back(name_of(current) + ": " + why + place);
}

void yield_to_scheduler() { emulator_switch(&threads[current].stack_pointer, scheduler_stack); }

void wait(const std::string& why) {
  threads[current].state = State::WAITING;
  threads[current].waits_for = why;
  yield_to_scheduler();
}

// All of these have met: each knows what the others have done before.
void synchronise(const std::vector<unsigned>& arrived, const std::vector<unsigned>& waiting) {
  if (!IS_CHECKED) return;
  Clock all(threads.size(), 0);
  for (const unsigned thread : arrived) join(all, threads[thread].clock);
  for (const unsigned thread : waiting) join(threads[thread].clock, all);
  for (const unsigned thread : arrived) ++threads[thread].clock[thread];
}

std::vector<unsigned> members(unsigned warp, uint32_t mask) {
  std::vector<unsigned> found;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) found.push_back(warp * 32 + lane);
  return found;
}

// The last lane to come does `act` for all.
template <typename Act>
void meet(uint32_t mask, const char* what, const Act& act) {
  const unsigned warp = current / 32;
  const uint32_t own = 1u << current % 32;
  if ((mask & own) == 0) fail(std::string(what) + " with a mask that lacks its own lane");
  auto& open = meetings[warp];
  auto found = std::find_if(open.begin(), open.end(),
                            [&](const Meeting& meeting) { return (meeting.mask & mask) != 0; });
  if (found == open.end()) found = open.insert(open.end(), {mask, 0, what});
  if (found->mask != mask || std::strcmp(found->what, what) != 0)
    fail(std::string(what) + " while other lanes of its mask are at " + found->what);
  found->here |= own;
  if (found->here != mask) return wait(what);
  open.erase(found);
  const std::vector<unsigned> lanes = members(warp, mask);
  act(lanes);
  for (const unsigned thread : lanes) threads[thread].state = State::READY;
}

void thread_main() {
  thread_body(thread_closure);
  if (!threads[current].copies.empty()) fail("ends without waiting for its copies");
  threads[current].state = State::DONE;
  yield_to_scheduler();
  std::abort();
}

void start_thread(unsigned thread) {
  Thread& own = threads[thread];
  own.state = State::READY;
  own.copies.clear();
  own.clock.assign(IS_CHECKED ? threads.size() : 0, 0);
  if (IS_CHECKED) own.clock[thread] = 1;
  void** top = reinterpret_cast<void**>(stacks + (thread + 1) * STACK_BYTES);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  own.stack_pointer = top;
}

void run_thread(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  emulator_switch(&scheduler_stack, threads[thread].stack_pointer);
}

std::string standstill() {
  std::string message = "block " + std::to_string(block) + " stands still:";
  for (unsigned first = 0; first < threads.size(); first += 32) {
    const Thread& lane = threads[first];
    message += " warp " + std::to_string(first / 32) +
               (lane.state == State::DONE ? " has ended;" : " waits for " + lane.waits_for + ";");
  }
  return message;
}

void run_block() {
  const unsigned warps = (threads.size() + 31) / 32;
  meetings.assign(warps, {});
  for (Barrier& barrier : barriers) barrier = {};
  // What nobody has written is not a number.
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));
  for (unsigned thread = 0; thread < threads.size(); ++thread) start_thread(thread);
  std::vector<unsigned> ready(warps);
  while (true) {
    ready.clear();
    bool done = true;
    for (unsigned warp = 0; warp < warps; ++warp) {
      bool can_run = false;
      for (unsigned thread = warp * 32; thread < std::min<size_t>(warp * 32 + 32, threads.size());
           ++thread) {
        can_run |= threads[thread].state == State::READY;
        done &= threads[thread].state == State::DONE;
      }
      if (can_run) ready.push_back(warp);
    }
    if (done) return;
    if (ready.empty()) {
      failure = standstill();
      return;
    }
    const unsigned warp = ready[order() % ready.size()];
    const unsigned turn = order() % 32;
    for (unsigned at = 0; at < 32; ++at) {
      const unsigned thread = warp * 32 + (at + turn) % 32;
      if (thread >= threads.size() || threads[thread].state != State::READY) continue;
      run_thread(thread);
      if (!failure.empty()) return;
    }
  }
}

bool lies_in(uintptr_t begin, uintptr_t end, const void* memory, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  return begin >= first && end <= first + bytes;
}

// Whether anyone else's access can matter there; fails where nobody may go.
bool is_common(uintptr_t begin, uintptr_t end, bool write) {
  if (lies_in(begin, end, stacks, STACK_BYTES * threads.size())) return false;
  if (lies_in(begin, end, thread_closure, closure_size)) return false;
  if (lies_in(begin, end, shared.data(), shared.size())) return true;
  const char* image = &__ehdr_start;
  if (lies_in(begin, end, image, static_cast<size_t>(&_end - image))) return true;
  for (const Range& range : tensors)
    if (begin >= range.begin && end <= range.end) {
      if (write && !range.writable) fail("writes to an input");
      return true;
    }
  fail((write ? "writes " : "reads ") + std::to_string(end - begin) +
       " bytes outside of shared memory and of every tensor");
}

void check_cell(uintptr_t address, bool write) {
  Cell& cell = cells[address];
  if (cell.block != block) {
    // Blocks have no order: what another has written is nobody else's to touch.
    if (cell.block != ~0u && (cell.write.thread >= 0 || (write && !cell.reads.empty())) &&
        !lies_in(address, address, shared.data(), shared.size()) &&
        !lies_in(address, address, &__ehdr_start, &_end - &__ehdr_start))
      fail("touches a tensor's element that block " + std::to_string(cell.block) +
           (cell.write.thread >= 0 ? " has written" : " has read"));
    cell = {};
    cell.block = block;
  }
  const Clock& clock = threads[current].clock;
  const auto comes_before = [&](const Access& access) {
    return access.time <= clock[access.thread];
  };
  const auto where = [&] {
    const auto base = reinterpret_cast<uintptr_t>(shared.data());
    return address >= base && address < base + shared.size()
               ? "shared memory + " + std::to_string(address - base)
               : std::string("a tensor or static memory");
  };
  if (cell.write.thread >= 0 && !comes_before(cell.write))
    fail((write ? "writes" : "reads") + (" " + where()) + ", written by thread " +
         std::to_string(cell.write.thread) + " with nothing between");
  const Access own{static_cast<int>(current), clock[current]};
  if (!write) {
    for (Access& access : cell.reads)
      if (access.thread == own.thread) {
        access = own;
        return;
      }
    cell.reads.push_back(own);
    return;
  }
  for (const Access& access : cell.reads)
    if (!comes_before(access))
      fail("writes " + where() + ", read by thread " + std::to_string(access.thread) +
           " with nothing between");
  cell.reads.clear();
  cell.write = own;
}

constexpr uintptr_t CELL_BYTES = 2;

void check(const void* memory, size_t bytes, bool write, bool aligned, const void* by = nullptr) {
  if (thread_body == nullptr) return;
  accessed_by = by;
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  if (!is_common(begin, end, write)) {
    accessed_by = nullptr;
    return;
  }
  if (aligned && begin % bytes != 0)
    fail(std::to_string(bytes) + " bytes at an address that is no multiple of that");
  for (uintptr_t at = begin / CELL_BYTES * CELL_BYTES; at < end; at += CELL_BYTES)
    check_cell(at, write);
  accessed_by = nullptr;
}

uint16_t element_of(uint32_t pair, int upper) {
  return static_cast<uint16_t>(upper != 0 ? pair >> 16 : pair);
}
float value_of(uint32_t pair, int upper, Operands operands) {
  const uint16_t bits = element_of(pair, upper);
  return operands == Operands::HALF ? from_half(bits)
                                    : emulator_cast<float>(static_cast<uint32_t>(bits) << 16);
}
float value_of_tf32(uint32_t bits) {
  // The hardware would drop these, which is no rounding.
  if ((bits & 0x1fff) != 0 && (bits & 0x7f800000) != 0x7f800000)
    fail("a product of tf32 gets a value that is not rounded to it");
  return emulator_cast<float>(bits);
}

}  // namespace

int run(Index blocks, unsigned count, size_t shared_bytes, void (*body)(void*), void* closure,
        size_t closure_bytes) {
  if (!failure.empty()) return 1;
  accessed_by = nullptr;
  threads.assign(count, {});
  // Both ends are aligned as on a GPU.
  shared.assign(shared_bytes + 1024, 0);
  const size_t bytes = STACK_BYTES * count;
  stacks = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) std::abort();
  thread_body = body;
  thread_closure = closure;
  closure_size = closure_bytes;
  cells.clear();
  gridDim = blocks;
  std::vector<unsigned> queue(blocks.x * blocks.y * blocks.z);
  for (size_t at = 0; at < queue.size(); ++at) queue[at] = at;
  std::shuffle(queue.begin(), queue.end(), order);
  for (const unsigned at : queue) {
    block = at;
    blockIdx = {at % blocks.x, at / blocks.x % blocks.y, at / blocks.x / blocks.y};
    run_block();
    if (!failure.empty()) break;
  }
  thread_body = nullptr;
  munmap(stacks, bytes);
  return failure.empty() ? 0 : 1;
}

// Not held against other accesses: those that are atomic do not race.
int atomic_add(int* to, int value) { return std::exchange(*to, *to + value); }

unsigned lane() { return current % 32; }

void* shared_memory() {
  const auto begin = reinterpret_cast<uintptr_t>(shared.data());
  return reinterpret_cast<void*>((begin + 1023) / 1024 * 1024);
}

uint32_t shared_offset(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) -
                               static_cast<const char*>(shared_memory()));
}

void sync(int index, int count) {
  Barrier& barrier = barriers[index];
  arrive(index, count);
  if (barrier.here.empty()) return;  // it was the last
  barrier.waiting.push_back(current);
  wait("barrier " + std::to_string(index));
}

void arrive(int index, int count) {
  if (index < 0 || index >= BARRIERS) fail("there is no barrier " + std::to_string(index));
  Barrier& barrier = barriers[index];
  if (count == 0) count = static_cast<int>(threads.size());
  if (count % 32 != 0) fail("a barrier of no whole warps");
  if (!barrier.here.empty() && barrier.count != count)
    fail("barrier " + std::to_string(index) + " with another count of threads");
  if (std::find(barrier.here.begin(), barrier.here.end(), current) != barrier.here.end())
    fail("comes to barrier " + std::to_string(index) + " twice");
  barrier.count = count;
  barrier.here.push_back(current);
  if (static_cast<int>(barrier.here.size()) < count) return;
  Barrier met;
  std::swap(met, barrier);
  std::vector<unsigned> waiting = met.waiting;
  waiting.push_back(current);
  synchronise(met.here, waiting);
  for (const unsigned thread : met.waiting) threads[thread].state = State::READY;
}

void sync_warp(uint32_t mask) {
  meet(mask, "__syncwarp", [](const std::vector<unsigned>& lanes) { synchronise(lanes, lanes); });
}

uint32_t shuffle(uint32_t mask, uint32_t value, int source) {
  Thread& own = threads[current];
  own.words[0] = value;
  own.words[1] = static_cast<uint32_t>(source);
  meet(mask, "a shuffle", [&](const std::vector<unsigned>& lanes) {
    for (const unsigned thread : lanes) {
      const unsigned from = threads[thread].words[1] % 32;
      if ((mask >> from & 1) == 0) fail("a shuffle from a lane that its mask lacks");
      threads[thread].result[0] = threads[thread / 32 * 32 + from].words[0];
    }
  });
  return own.result[0];
}

uint32_t match_any(uint32_t mask, uint32_t value) {
  Thread& own = threads[current];
  own.words[0] = value;
  meet(mask, "__match_any_sync", [&](const std::vector<unsigned>& lanes) {
    for (const unsigned thread : lanes) {
      threads[thread].result[0] = 0;
      for (const unsigned other : lanes)
        if (threads[other].words[0] == threads[thread].words[0])
          threads[thread].result[0] |= 1u << other % 32;
    }
  });
  return own.result[0];
}

void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operands operands) {
  Thread& own = threads[current];
  std::memcpy(own.words, a, sizeof a);
  std::memcpy(own.words + 4, b, sizeof b);
  std::memcpy(own.words + 6, sum, sizeof sum);
  meet(~0u, "mma", [&](const std::vector<unsigned>& lanes) {
    float first[16][16] = {}, second[16][8] = {};
    for (const unsigned thread : lanes) {
      const uint32_t* words = threads[thread].words;
      const int g = thread % 32 / 4, q = thread % 4 * 2;
      if (operands == Operands::TF32) {
        for (int part = 0; part < 4; ++part)
          first[g + part % 2 * 8][q / 2 + part / 2 * 4] = value_of_tf32(words[part]);
        for (int part = 0; part < 2; ++part)
          second[q / 2 + part * 4][g] = value_of_tf32(words[4 + part]);
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < 4; ++part)
          first[g + part % 2 * 8][q + part / 2 * 8 + i] = value_of(words[part], i, operands);
        for (int part = 0; part < 2; ++part)
          second[q + part * 8 + i][g] = value_of(words[4 + part], i, operands);
      }
    }
    for (const unsigned thread : lanes) {
      const int g = thread % 32 / 4, q = thread % 4 * 2;
      for (int at = 0; at < 4; ++at) {
        const int row = g + at / 2 * 8, column = q + at % 2;
        float own_sum;
        std::memcpy(&own_sum, &threads[thread].words[6 + at], sizeof own_sum);
        double total = own_sum;
        for (int k = 0; k < 16; ++k)
          total += static_cast<double>(first[row][k]) * second[k][column];
        threads[thread].result[at] = emulator_cast<uint32_t>(static_cast<float>(total));
      }
    }
  });
  std::memcpy(sum, own.result, sizeof sum);
}

void load_matrices(uint32_t (&to)[4], uint32_t address, bool transposed) {
  Thread& own = threads[current];
  const char* const base = static_cast<char*>(shared_memory());
  if (address % 16 != 0) fail("ldmatrix from an address that is no multiple of 16");
  if (IS_CHECKED) check(base + address, 16, false, true);
  own.words[0] = address;
  meet(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", [&](const std::vector<unsigned>& lanes) {
    const unsigned warp = lanes[0];
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int row = 0; row < 8; ++row)
        std::memcpy(elements[row], base + threads[warp + matrix * 8 + row].words[0], 16);
      for (const unsigned thread : lanes) {
        const int g = thread % 32 / 4, q = thread % 4 * 2;
        const uint32_t low = transposed ? elements[q][g] : elements[g][q];
        const uint32_t high = transposed ? elements[q + 1][g] : elements[g][q + 1];
        threads[thread].result[matrix] = high << 16 | low;
      }
    }
  });
  std::memcpy(to, own.result, sizeof to);
}

uint32_t transpose_matrix(uint32_t pair) {
  Thread& own = threads[current];
  own.words[0] = pair;
  meet(~0u, "movmatrix", [&](const std::vector<unsigned>& lanes) {
    uint16_t elements[8][8];
    for (const unsigned thread : lanes)
      for (int i = 0; i < 2; ++i)
        elements[thread % 32 / 4][thread % 4 * 2 + i] = element_of(threads[thread].words[0], i);
    for (const unsigned thread : lanes) {
      const int g = thread % 32 / 4, q = thread % 4 * 2;
      threads[thread].result[0] = static_cast<uint32_t>(elements[q + 1][g]) << 16 | elements[q][g];
    }
  });
  return own.result[0];
}

// The copy is made as late as it may be; others must keep away from here to there.
void copy_async(uint32_t to, const void* from, int bytes) {
  char* const target = static_cast<char*>(shared_memory()) + to;
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("cp.async at an address that is no multiple of 16");
  if (IS_CHECKED) {
    if (bytes != 0) check(from, bytes, false, false);
    check(target, 16, true, true);
  }
  threads[current].copies.push_back({to, from, bytes});
}

void wait_for_copies() {
  char* const base = static_cast<char*>(shared_memory());
  for (const Copy& copy : threads[current].copies) {
    std::memset(base + copy.to, 0, 16);
    std::memcpy(base + copy.to, copy.from, copy.bytes);
    if (IS_CHECKED) check(base + copy.to, 16, true, true);
  }
  threads[current].copies.clear();
}

float from_half(uint16_t bits) { return static_cast<float>(emulator_cast<_Float16>(bits)); }
uint16_t to_half(float value) { return emulator_cast<uint16_t>(static_cast<_Float16>(value)); }
uint16_t to_bfloat16(float value) {
  const auto bits = emulator_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Halves are rounded away from zero.
uint32_t to_tf32(float value) {
  const auto bits = emulator_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits & ~0x1fffu;
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  return emulator::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t) { return emulator::failure.c_str(); }

extern "C" {
// Forgets everything but this: the order's seed.
__attribute__((visibility("default"))) void emulator_begin(unsigned seed) {
  emulator::order.seed(seed);
  emulator::failure.clear();
  emulator::tensors.clear();
}
__attribute__((visibility("default"))) int emulator_allowed() {
  return emulator::tensors.empty() ? 0 : 1;
}
__attribute__((visibility("default"))) void emulator_end() { emulator::tensors.clear(); }
// Memory that kernels may touch.
__attribute__((visibility("default"))) void emulator_allow(void* memory, size_t bytes,
                                                           int writable) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  emulator::tensors.push_back({begin, begin + bytes, writable != 0});
}

#ifdef CHECKED
#define ACCESS(name, bytes, writes, aligned)                                  \
  void __tsan_##name(void* at) {                                              \
    emulator::check(at, bytes, writes, aligned, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                              \
  ACCESS(read##bytes, bytes, false, true)            \
  ACCESS(write##bytes, bytes, true, true)            \
  ACCESS(unaligned_read##bytes, bytes, false, false) \
  ACCESS(unaligned_write##bytes, bytes, true, false)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) {
  emulator::check(at, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  emulator::check(at, bytes, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#endif
}
