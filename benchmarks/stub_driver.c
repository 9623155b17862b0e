// A CUDA driver without a device: it loads cubins as far as to look for their entries, and writes launches down.
// Compile with: gcc -O2 -shared -fPIC -o libstub.so stub_driver.c
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { MOST_LAUNCHES = 4096, MOST_PARAMETERS = 64, MOST_FUNCTIONS = 1024 };
enum { INVALID_IMAGE = 200, INVALID_CONTEXT = 201, OTHER_DEVICE = 209, NOT_FOUND = 500 };

typedef struct { unsigned grid[3], block[3], shared; void *stream; struct { unsigned id, pad; int value[16]; } *attributes; unsigned count; } Config;
typedef struct { char name[256]; const void *image; int shared; } Function;
typedef struct {
    char name[256];
    unsigned grid[3], block[3], shared, dependent;
    uint64_t stream, parameters[MOST_PARAMETERS];
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch launches[MOST_LAUNCHES];
static Function functions[MOST_FUNCTIONS];
static int launch_count, function_count, load_count, recording = 1, arch = 90, capturing, refusal, parameter_count;
static __thread void *context;

// What tests set and read.
void stub_reset(int architecture, int parameters) {
    launch_count = function_count = load_count = capturing = refusal = 0;
    arch = architecture;
    parameter_count = parameters;
    context = 0;
}
void stub_parameters(int count) { parameter_count = count; }
void stub_record(int on) { recording = on; }
void stub_capture(int on) { capturing = on; }
void stub_refuse(int code) { refusal = code; }
int stub_launches(void) { return launch_count; }
int stub_loads(void) { return load_count; }
const Launch *stub_launch(int i) { return &launches[i]; }

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int code, const char **text) {
    *text = code == INVALID_IMAGE ? "invalid image" : code == OTHER_DEVICE ? "no binary for this GPU" : "refused";
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? arch / 10 : arch % 10;
    return 0;
}
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stub device", length); return 0; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = (void *)(uintptr_t)(device + 1); return 0; }
int cuCtxPushCurrent_v2(void *pushed) { return 0; }
int cuCtxPopCurrent_v2(void **popped) { return 0; }
int cuCtxSetCurrent(void *chosen) { context = chosen; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }

int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) {
    if (refusal) return refusal;
    if (memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
    load_count++;
    *module = (void *)image;
    return 0;
}
int cuModuleGetFunction(void **found, void *module, const char *name) {
    const Elf64_Ehdr *header = module;
    size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    if (!memmem(module, size, name, strlen(name) + 1)) return NOT_FOUND;
    Function *f = &functions[function_count++ % MOST_FUNCTIONS];
    strncpy(f->name, name, sizeof f->name - 1);
    f->image = module;
    f->shared = 0;
    *found = f;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == 8) ((Function *)function)->shared = value;
    return 0;
}
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    Function *f = function;
    if (!context) return INVALID_CONTEXT;
    if (config->shared > 48 * 1024 && config->shared > (unsigned)f->shared) return 1;
    if (!recording) return 0;
    pthread_mutex_lock(&lock);
    Launch *l = &launches[launch_count++ % MOST_LAUNCHES];
    strncpy(l->name, f->name, sizeof l->name);
    memcpy(l->grid, config->grid, sizeof l->grid);
    memcpy(l->block, config->block, sizeof l->block);
    l->shared = config->shared;
    l->stream = (uint64_t)config->stream;
    l->dependent = config->count == 1 && config->attributes[0].id == 6 && config->attributes[0].value[0] == 1;
    for (int i = 0; i < parameter_count; i++) l->parameters[i] = *(uint64_t *)parameters[i];
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t size, void *stream) {
    if (!context) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    Launch *l = &launches[launch_count++ % MOST_LAUNCHES];
    memset(l, 0, sizeof *l);
    strcpy(l->name, "memset");
    l->parameters[0] = at;
    l->parameters[1] = size;
    l->stream = (uint64_t)stream;
    pthread_mutex_unlock(&lock);
    return 0;
}
