/* What tracking/system.py asks of libnvidia-ml.so.1: three GPUs, of which the second does not tell its power, and one
 * MIG instance, on the last. Structures and numbers of errors are NVML's. */

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, BAD_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, NUM_GPUS = 3 };

struct device {
    unsigned index;
    const char *uuid;
    struct device *parent;
};
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;

static struct device devices[] = {
    {0, "GPU-5a000000-0000-0000-0000-000000000000", NULL},
    {1, "GPU-5b000000-0000-0000-0000-000000000000", NULL},
    {2, "GPU-77000000-0000-0000-0000-000000000000", NULL},
    {0, "MIG-e1000000-0000-0000-0000-000000000000", &devices[2]},
};

int nvmlInitWithFlags(unsigned flags) { return flags == 0 ? OK : BAD_ARGUMENT; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int result) { return result == NOT_SUPPORTED ? "Not Supported" : "another error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = NUM_GPUS;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) {
    if (index >= NUM_GPUS) return BAD_ARGUMENT;
    *device = &devices[index];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **device) {
    for (unsigned i = 0; i < sizeof devices / sizeof *devices; ++i)
        if (strcmp(devices[i].uuid, uuid) == 0) {
            *device = &devices[i];
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", device->uuid);
    return OK;
}

int nvmlDeviceGetIndex(struct device *device, unsigned *index) {
    *index = device->index;
    return OK;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(struct device *device, struct device **parent) {
    if (device->parent == NULL) return BAD_ARGUMENT;
    *parent = device->parent;
    return OK;
}

int nvmlDeviceGetUtilizationRates(struct device *device, utilization *found) {
    if (device->parent != NULL) return NOT_SUPPORTED;
    found->gpu = 90 + device->index;
    return OK;
}

int nvmlDeviceGetMemoryInfo_v2(struct device *device, memory_v2 *found) {
    found->total = device->parent ? 10000000000ULL : 80000000000ULL;
    found->used = found->total / 4;
    return OK;
}

int nvmlDeviceGetPowerUsage(struct device *device, unsigned *milliwatts) {
    if (device->parent != NULL || device->index == 1) return NOT_SUPPORTED;
    *milliwatts = 350500;
    return OK;
}
