// What the runtime calls (precast/runtime/engines/aoti.py): the constants and a step of one graph, over arrays that the
// caller owns. ABI_VERSION counts changes of this interface; the artifact says which one its libraries have.
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "standalone.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A weight that the graph needs: the library's own name for it, and the model's.
struct PrecastConstant {
  const char *name, *model_name;
  int32_t dtype;
};

// The graph of this library, opened. Steps of several threads take turns: what Inductor writes has variables of which
// there is one (inductor_cpu_integer_div_error_flag).
struct PrecastGraph {
  AOTInductorModelContainerHandle container = nullptr;
  std::mutex turn;
  pid_t process = getpid();

  ~PrecastGraph() {
    if (container != nullptr) AOTInductorModelContainerDelete(container);
  }
};

namespace {

using precast::check, precast::copy_out, precast::Tensors, precast::wrap;

constexpr int32_t ABI_VERSION = 1;

thread_local std::string failure;

int32_t report(const std::string& what) {
  const std::string within = precast::take_failure();
  failure = within.empty() ? what : within;
  return 1;
}

template <typename Work>
int32_t attempt(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    return report(error.what());
  }
}

}  // namespace

EXPORTED int32_t precast_abi() { return ABI_VERSION; }

// Why the last call of this thread failed.
EXPORTED const char* precast_failure() { return failure.c_str(); }

EXPORTED int32_t precast_open(PrecastGraph** graph) {
  return attempt([&] {
    auto made = std::make_unique<PrecastGraph>();
    check(
        AOTInductorModelContainerCreateWithDevice(&made->container, 1, "cpu", nullptr), "the graph cannot be set up");
    *graph = made.release();
  });
}

EXPORTED void precast_close(PrecastGraph* graph) { delete graph; }

// Describes the first `count` constants; returns how many there are.
EXPORTED size_t precast_constants(PrecastGraph* graph, PrecastConstant* constants, size_t count) {
  size_t all = 0;
  AOTInductorModelContainerGetNumConstants(graph->container, &all);
  for (size_t i = 0; i < count && i < all; ++i) {
    PrecastConstant& each = constants[i];
    AOTInductorModelContainerGetConstantName(graph->container, i, &each.name);
    AOTInductorModelContainerGetConstantOriginalFQN(graph->container, i, &each.model_name);
    AOTInductorModelContainerGetConstantDtype(graph->container, i, &each.dtype);
  }
  return all;
}

// Gives the graph its constants, by the library's own names. None is copied.
EXPORTED int32_t precast_set_constants(
    PrecastGraph* graph, const char* const* names, const PrecastArray* arrays, size_t count) {
  return attempt([&] {
    Tensors tensors(count);
    std::vector<AOTInductorConstantMapEntry> entries(count);
    for (size_t i = 0; i < count; ++i) entries[i] = {names[i], tensors.all[i] = wrap(arrays[i])};
    check(
        AOTInductorModelContainerUpdateUserManagedConstantBufferPairs(
            graph->container, entries.data(), count, false, true),
        "the weights do not fit");
  });
}

EXPORTED int32_t precast_run(
    PrecastGraph* graph, const PrecastArray* inputs, size_t input_count, const PrecastArray* outputs,
    size_t output_count, int32_t threads) {
  return attempt([&] {
    if (graph->process != getpid()) {
      // In the child of a fork: whoever had its turn then is not here.
      new (&graph->turn) std::mutex;
      graph->process = getpid();
    }
    const std::lock_guard<std::mutex> turn(graph->turn);
    precast::set_threads(threads);
    // The graph takes the inputs, and leaves nullptr in their places.
    Tensors given(input_count), made(output_count);
    for (size_t i = 0; i < input_count; ++i) given.all[i] = wrap(inputs[i]);
    check(
        AOTInductorModelContainerRunSingleThreaded(
            graph->container, given.all.data(), input_count, made.all.data(), output_count, nullptr, nullptr),
        "no reason given");
    for (size_t i = 0; i < output_count; ++i) copy_out(made.all[i], outputs[i]);
  });
}
