// The emulator's fiber switch, and the functions by which tests control the emulator.
#define SIMT_MAIN
#include "cuda_runtime.h"

extern "C" void simt_schedule(int order, int greedy, int early_copies, unsigned seed, int os_threads) {
  simt::schedule = {static_cast<simt::Order>(order), greedy != 0, early_copies != 0, seed, os_threads};
}

extern "C" void simt_device(int shared_limit, int processors, int warpgroups) {
  simt::device = {shared_limit, processors, warpgroups != 0};
}

extern "C" void simt_fail(int status) { simt::failure = status; }
