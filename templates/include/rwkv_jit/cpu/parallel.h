#pragma once
// Independent items over threads. Which thread takes an item changes nothing in its result.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// OpenMP's entry point, found at load time where the process has a runtime, as with torch it has.
// Its threads spin for a while after torch's own loops; a second pool would fight them for cores.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));

namespace rwkv_jit {

// How many threads `items` pieces of `work` multiply-adds each are worth.
inline int64_t useful_threads(int64_t threads, int64_t items, double work) {
  const double thread_start = 1e5;  // in multiply-adds
  const double worth = static_cast<double>(items) * work / thread_start;
  return std::max<int64_t>(1,
                           std::min({threads, items, static_cast<int64_t>(std::min(worth, 1e6))}));
}

// Calls run(item, worker) for every item; worker is below `workers`. Where the system refuses a
// thread, those that it granted do the work.
template <typename Run>
void parallel_for(int64_t items, int64_t workers, const Run& run) {
  std::atomic<int64_t> next_item{0}, next_worker{0};
  auto work = [&] {
    const int64_t worker = next_worker.fetch_add(1);
    for (int64_t item; (item = next_item.fetch_add(1)) < items;) run(item, worker);
  };
  if (workers <= 1) {
    work();
  } else if (GOMP_parallel != nullptr) {
    const auto call = [](void* data) { (*static_cast<decltype(work)*>(data))(); };
    GOMP_parallel(call, &work, static_cast<unsigned>(workers), 0);
  } else {
    std::vector<std::thread> threads;
    threads.reserve(workers);
    try {
      for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(work);
    } catch (const std::system_error&) {
    }
    work();
    for (std::thread& thread : threads) thread.join();
  }
}

// Calls run(item, workspace) for every item, each of which is `work` multiply-adds. Returns the
// launcher's code: not 0 where there was no memory for the workspaces.
template <typename Workspace, typename Run>
int run_items(int64_t threads, int64_t items, double work, const Run& run) {
  const int64_t workers = useful_threads(threads, items, work);
  try {
    std::vector<std::unique_ptr<Workspace>> workspaces(workers);
    for (auto& one : workspaces) one = std::make_unique<Workspace>();
    parallel_for(items, workers,
                 [&](int64_t item, int64_t worker) { run(item, *workspaces[worker]); });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// Calls run(args, s, head, workspace) for every head of every sequence; a head's token is `work`
// multiply-adds. Returns the launcher's code.
template <typename Workspace, typename Args, typename Run>
int run_heads(const Args& args, double work, const Run& run) {
  const double tokens = args.cu_seqlens != nullptr ? double(args.T) / args.S : double(args.T);
  return run_items<Workspace>(args.threads, args.S * args.H, (tokens + 1) * work,
                              [&](int64_t item, Workspace& workspace) {
                                run(args, item / args.H, item % args.H, workspace);
                              });
}

}  // namespace rwkv_jit
