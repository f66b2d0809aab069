/* A CUDA driver without a GPU: libcuda.so.1. Kernels are looked up in the image that is loaded, and every launch is logged.
 *
 * EXITIFY_FAKE_GPU      compute capability and CUDA version, "87 12060"; without it there is no GPU
 * EXITIFY_FAKE_LAUNCHES a file that gets a line a launch: kernel, grid, block
 * EXITIFY_FAKE_KERNELS  a shared object with the same kernels for the processor (on_processor.hpp); without it launches compute nothing
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_IMAGE = 200, NO_BINARY_FOR_GPU = 209, NOT_FOUND = 500 };
enum { MAJOR = 75, MINOR = 76, ELF_OF_CUDA = 190 };

typedef void (*Kernel)(void **arguments, unsigned const *grid, unsigned const *block, unsigned shared_bytes);
typedef struct { char name[256]; Kernel run; } Function;
typedef struct { unsigned grid[3], block[3], shared_bytes; } Launch; /* how CUlaunchConfig begins */

static int capability(int *version) {
    int major_minor = 0, ignored;
    const char *text = getenv("EXITIFY_FAKE_GPU");
    if (text == NULL || sscanf(text, "%d %d", &major_minor, version ? version : &ignored) != 2) return 0;
    return major_minor;
}

int cuInit(unsigned flags) { return capability(NULL) ? SUCCESS : NO_DEVICE; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDriverGetVersion(int *version) { capability(version); return SUCCESS; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "fake GPU"); return SUCCESS; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != MAJOR && attribute != MINOR) return INVALID_VALUE;
    *value = attribute == MAJOR ? capability(NULL) / 10 : capability(NULL) % 10;
    return SUCCESS;
}

/* An image: machine code for this GPU alone, or PTX text. The driver is given no size: an ELF says its own. */
typedef struct { const unsigned char *bytes; size_t size; } Image;

int cuModuleLoadData(Image **module, const void *data) {
    const unsigned char *bytes = data;
    size_t size;
    if (memcmp(bytes, "\177ELF", 4) == 0) {
        uint64_t sections;
        uint16_t machine, entry, count;
        uint32_t flags;
        memcpy(&machine, bytes + 18, 2), memcpy(&sections, bytes + 40, 8), memcpy(&flags, bytes + 48, 4);
        memcpy(&entry, bytes + 58, 2), memcpy(&count, bytes + 60, 2);
        if (machine != ELF_OF_CUDA) return INVALID_IMAGE;
        if ((int)((bytes[8] >= 8 ? flags >> 8 : flags) & 0xff) != capability(NULL)) return NO_BINARY_FOR_GPU;
        size = sections + (size_t)entry * count;
    } else if (strstr(data, ".version")) {
        size = strlen(data);
    } else {
        return INVALID_IMAGE;
    }
    *module = malloc(sizeof(Image));
    **module = (Image){memcpy(malloc(size), data, size), size};
    return SUCCESS;
}

int cuModuleUnload(Image *module) { return SUCCESS; }

int cuModuleGetFunction(Function **function, const Image *module, const char *name) {
    const char *library = getenv("EXITIFY_FAKE_KERNELS");
    char runner[300];
    if (memmem(module->bytes, module->size, name, strlen(name)) == NULL) return NOT_FOUND;
    *function = calloc(1, sizeof(Function));
    snprintf((*function)->name, sizeof (*function)->name, "%s", name);
    snprintf(runner, sizeof runner, "run_%s", name);
    if (library != NULL) {
        void *kernels = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        if (kernels == NULL) fprintf(stderr, "%s\n", dlerror());
        (*function)->run = kernels ? (Kernel)dlsym(kernels, runner) : NULL;
        if ((*function)->run == NULL) return NOT_FOUND;
    }
    return SUCCESS;
}

int cuFuncSetAttribute(Function *function, int attribute, int value) { return SUCCESS; }

int cuLaunchKernelEx(const Launch *launch, Function *function, void **arguments, void **extra) {
    const char *path = getenv("EXITIFY_FAKE_LAUNCHES");
    const unsigned *grid = launch->grid, *block = launch->block;
    if (block[0] * block[1] * block[2] > 1024 || launch->shared_bytes > 48 * 1024) return INVALID_VALUE;
    if (path != NULL) {
        FILE *log = fopen(path, "a");
        fprintf(log, "%s %u,%u,%u %u,%u,%u\n", function->name, grid[0], grid[1], grid[2], block[0], block[1], block[2]);
        fclose(log);
    }
    if (function->run != NULL) function->run(arguments, grid, block, launch->shared_bytes);
    return SUCCESS;
}

int cuGetErrorName(int error, const char **text) { *text = error == NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "the fake driver refuses"; return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
