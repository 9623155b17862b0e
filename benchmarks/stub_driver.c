// A CUDA driver without a device: it loads cubins as far as to look for their entries, and writes launches down, with
// as many parameters, of as many bytes, as the cubin says that the kernel has.
// Compile with: gcc -O2 -shared -fPIC -o libstub.so stub_driver.c
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { MOST_LAUNCHES = 4096, MOST_PARAMETERS = 64, MOST_FUNCTIONS = 1024 };
enum { INVALID_IMAGE = 200, INVALID_CONTEXT = 201, OTHER_DEVICE = 209, NOT_FOUND = 500 };

typedef struct { unsigned grid[3], block[3], shared; void *stream; struct { unsigned id, pad; int value[16]; } *attributes; unsigned count; } Config;
typedef struct { char name[256]; int shared, parameter_count; unsigned sizes[MOST_PARAMETERS]; } Function;
typedef struct {
    char name[256];
    unsigned grid[3], block[3], shared, dependent, parameter_count;
    uint64_t stream, parameters[MOST_PARAMETERS];
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch launches[MOST_LAUNCHES];
static Function functions[MOST_FUNCTIONS];
static int launch_count, function_count, load_count, recording = 1, arch = 90, capturing, refusal;
static __thread void *context;

// What tests set and read.
void stub_reset(int architecture) {
    launch_count = function_count = load_count = capturing = refusal = 0;
    arch = architecture;
    context = 0;
}
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
    *value = attribute == 75 ? arch / 10 : attribute == 76 ? arch % 10 : 4;  /* 16: multiprocessors */
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
// Entries of `.nv.info.<kernel>`: a format and an attribute in a byte each, then the value, or its size and the value.
// EIATTR_KPARAM_INFO describes one parameter: index, ordinal, offset, and flags whose upper 14 bits are the size.
static void read_parameters(Function *f, const char *image) {
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    char wanted[300] = ".nv.info.";
    strcat(wanted, f->name);
    for (int i = 0; i < header->e_shnum; i++) {
        if (strcmp(names + sections[i].sh_name, wanted)) continue;
        const char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at < end) {
            unsigned char format = at[0], attribute = at[1];
            uint16_t size = *(const uint16_t *)(at + 2);
            if (format == 4 && attribute == 0x17) {
                unsigned ordinal = *(const uint16_t *)(at + 8);
                f->sizes[ordinal] = *(const uint32_t *)(at + 12) >> 18;
                if ((int)ordinal >= f->parameter_count) f->parameter_count = ordinal + 1;
            }
            at += format == 4 ? 4 + size : 4;
        }
    }
}
int cuModuleGetFunction(void **found, void *module, const char *name) {
    const Elf64_Ehdr *header = module;
    size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    if (!memmem(module, size, name, strlen(name) + 1)) return NOT_FOUND;
    Function *f = &functions[function_count++ % MOST_FUNCTIONS];
    memset(f, 0, sizeof *f);
    strncpy(f->name, name, sizeof f->name - 1);
    read_parameters(f, module);
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
    l->parameter_count = f->parameter_count;
    memset(l->parameters, 0, sizeof l->parameters);
    for (int i = 0; i < f->parameter_count; i++) memcpy(&l->parameters[i], parameters[i], f->sizes[i]);
    pthread_mutex_unlock(&lock);
    return 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t size, void *stream) {
    if (!context) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    Launch *l = &launches[launch_count++ % MOST_LAUNCHES];
    memset(l, 0, sizeof *l);
    strcpy(l->name, "memset");
    l->parameter_count = 2;
    l->parameters[0] = at;
    l->parameters[1] = size;
    l->stream = (uint64_t)stream;
    pthread_mutex_unlock(&lock);
    return 0;
}
