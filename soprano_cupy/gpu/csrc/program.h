// A program: launches packed once, whose grids and a few parameters follow numbers given at each run.
#pragma once

#include "cuda_driver.h"

enum { SYMBOLS = 4, MAX_ATTRIBUTES = 3, MAX_GRID_X = 0x7fffffff, MAX_GRID_YZ = 65535 };

typedef struct {
    LaunchConfig config;  // its attributes point to those below
    LaunchAttribute attributes[MAX_ATTRIBUTES];
    Function function;
    void* arguments[1];  // the one struct that the kernel takes
} Step;

typedef struct {  // grid[axis] of a step = repeat * ceil(symbol * times / of_each), at least repeat
    int32_t step, axis, symbol;
    int64_t of_each, times, repeat;
} Rule;

typedef struct {  // a 32-bit integer among the parameters
    int32_t* target;
    int32_t symbol;
} Patch;

typedef struct {
    int step_count, rule_count, patch_count;
    Step* steps;
    Rule* rules;
    Patch* patches;
    int32_t symbols[SYMBOLS];  // of the last run: grids and parameters hold them
    int resolved;
} Plan;

void step_add_cluster(Step* step, uint32_t blocks);
void step_add_cooperative(Step* step);
void step_add_programmatic(Step* step);
uint32_t step_cluster(const Step* step);

// Blocks that a rule amounts to, without regard to limits; INT64_MAX where that does not fit.
int64_t rule_blocks(const Rule* rule, const int32_t* symbols);

// Brings grids and parameters to these symbols. 0, or -1 with the rule in `bad`, and nothing changed, where a grid would
// exceed the machine's limits or is no whole number of clusters.
int plan_resolve(Plan* plan, const int32_t* symbols, int* bad);

Status step_launch(Step* step, const Driver* driver, Stream stream);

// Launches every step on the stream, up to the first error, whose step is left in `at`. checked: waits after each step, so
// that a kernel's own fault is known as its own.
Status plan_launch(Plan* plan, const Driver* driver, Stream stream, int checked, int* at);
