/* CUDA's runtime without a GPU: libcudart.so.13, as much of it as TVM calls. The GPU's memory is the machine's own. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100 };
enum { MAJOR = 75, MINOR = 76 };

static int capability(void) {
    const char *text = getenv("EXITIFY_FAKE_GPU");
    return text ? atoi(text) : 0;
}

int cudaGetDeviceCount(int *count) { *count = capability() ? 1 : 0; return *count ? SUCCESS : NO_DEVICE; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaSetDevice(int device) { return SUCCESS; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == MAJOR ? capability() / 10 : attribute == MINOR ? capability() % 10 : 1024;
    return SUCCESS;
}

int cudaMalloc(void **memory, size_t size) {
    *memory = aligned_alloc(256, (size + 255) / 256 * 256 + 256);
    memset(*memory, 0xff, size); /* what is read before it was written is not a number */
    return SUCCESS;
}

int cudaFree(void *memory) { free(memory); return SUCCESS; }
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { memmove(to, from, size); return SUCCESS; }
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) { memmove(to, from, size); return SUCCESS; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)1 << 32; return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return SUCCESS; }
int cudaStreamCreate(void **stream) { *stream = NULL; return SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void *stream) { return SUCCESS; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
int cudaEventCreate(void **event) { *event = calloc(1, sizeof(struct timespec)); return SUCCESS; }
int cudaEventDestroy(void *event) { free(event); return SUCCESS; }
int cudaEventRecord(void *event, void *stream) { clock_gettime(CLOCK_MONOTONIC, event); return SUCCESS; }
int cudaEventSynchronize(void *event) { return SUCCESS; }
int cudaEventElapsedTime(float *ms, const struct timespec *start, const struct timespec *end) {
    *ms = 1e3 * (end->tv_sec - start->tv_sec) + 1e-6 * (end->tv_nsec - start->tv_nsec);
    return SUCCESS;
}
int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }
const char *cudaGetErrorName(int error) { return "cudaError"; }
const char *cudaGetErrorString(int error) { return "the fake runtime refuses"; }
int cudaGetDeviceProperties(void *properties, int device) { return INVALID_VALUE; }
int cudaGraphInstantiate(void) { return INVALID_VALUE; }
int cudaGraphLaunch(void) { return INVALID_VALUE; }
int cudaGraphDestroy(void) { return INVALID_VALUE; }
int cudaGraphExecDestroy(void) { return INVALID_VALUE; }
int cudaStreamBeginCapture(void) { return INVALID_VALUE; }
int cudaStreamEndCapture(void) { return INVALID_VALUE; }
