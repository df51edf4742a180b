// Stands in for NVIDIA's driver where there is no GPU: it records what it is given.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <unistd.h>

// the parameters of the tests' kernel, laid out by a C compiler
struct Params {
  void* x;
  int n;
  void* y;
  float by;
  long long far;
  int last;
};

// as the driver's header has it
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

struct Record {
  uint64_t function, stream, size, grid[3], block[3], shared, launches, shared_asked, modules,
      mixed, attributes;
  int64_t marks_valid;
  Params params;
  char code[16];
};

static Record record;
static int next_launch_error = 0, pause_us = 0;
static std::atomic<uint64_t> counted_launches{0}, counted_mixed{0};
static thread_local bool has_context = false;

extern "C" {
Record* fake_record() {
  record.launches = counted_launches;
  record.mixed = counted_mixed;
  return &record;
}
void fake_pause(int microseconds) { pause_us = microseconds; }
void fake_fail_next_launch(int code) { next_launch_error = code; }

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &record; return 0; }
int cuCtxSetCurrent(void*) { has_context = true; return 0; }

int cuModuleLoadData(void** module, const void* code) {
  if (!has_context) return 201;
  ++record.modules;
  memcpy(record.code, code, sizeof record.code);
  *module = reinterpret_cast<void*>(0x7000000000000abc);
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (reinterpret_cast<uint64_t>(module) != 0x7000000000000abc) return 400;
  if (strcmp(name, "scale")) return 500;
  *function = reinterpret_cast<void*>(0x7000000000000def);
  return 0;
}

int cuFuncSetAttribute(void*, int attribute, int value) {
  if (attribute != 8 || value > 232448) return 1;
  record.shared_asked = value;
  return 0;
}

int cuLaunchKernelEx(const Config* config, void* f, void** params, void** extra) {
  if (!has_context) return 201;
  if (int code = next_launch_error) { next_launch_error = 0; return code; }
  record.function = reinterpret_cast<uint64_t>(f);
  record.stream = reinterpret_cast<uint64_t>(config->stream);
  record.shared = config->shared;
  std::copy_n(config->grid, 3, record.grid);
  std::copy_n(config->block, 3, record.block);
  record.attributes = config->attributes || config->attribute_count;
  record.marks_valid = !params && extra[0] == (void*)1 && extra[2] == (void*)2 && !extra[4];
  const size_t size = *static_cast<size_t*>(extra[3]);
  void* x = *static_cast<void**>(extra[1]);
  if (pause_us) usleep(pause_us);
  Params given = {};
  memcpy(&given, extra[1], std::min(size, sizeof given));
  record.size = size;
  record.params = given;
  // threads launch at once, and only what is counted has to hold for all of them
  counted_mixed += pause_us && (given.x != x || given.y != x);
  ++counted_launches;
  return 0;
}

int cuGetErrorName(int code, const char** text) {
  *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : nullptr;
  return !*text;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 1 ? "invalid argument" : code == 500 ? "named symbol not found" : nullptr;
  return !*text;
}

// the size that the driver expects: up to the last parameter's end
uint64_t fake_params_size() { return offsetof(Params, last) + sizeof(int); }
}
