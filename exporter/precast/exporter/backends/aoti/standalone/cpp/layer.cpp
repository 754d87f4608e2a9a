// A layer that is compiled by itself, as a function for the program that calls it. Within the object of a layer only this
// function can be seen, by a name of its own.
#include "arrays.h"

extern "C" void precast_layer(const PrecastArray* inputs, size_t input_count, const PrecastArray& output) {
  // Made with the first call, and there until the process ends.
  static const AOTInductorModelContainerHandle container = [] {
    AOTInductorModelContainerHandle made = nullptr;
    precast::check(AOTInductorModelContainerCreateWithDevice(&made, 1, "cpu", nullptr), "a layer cannot be set up");
    return made;
  }();
  // The layer takes the inputs, and leaves nullptr in their places.
  precast::Tensors given(input_count), made(1);
  for (size_t i = 0; i < input_count; ++i) given.all[i] = precast::wrap(inputs[i]);
  precast::check(
      AOTInductorModelContainerRun(
          container, given.all.data(), input_count, made.all.data(), 1, nullptr, nullptr),
      "no reason given");
  precast::copy_out(made.all[0], output);
}
