#include "program.h"

#include <string.h>

static LaunchAttribute* add(Step* step, uint32_t id) {
    LaunchAttribute* attribute = &step->attributes[step->config.attribute_count++];
    memset(attribute, 0, sizeof *attribute);
    attribute->id = id;
    step->config.attributes = step->attributes;
    return attribute;
}

void step_add_cluster(Step* step, uint32_t blocks) {
    LaunchAttribute* attribute = add(step, ATTRIBUTE_CLUSTER);
    attribute->value.cluster.x = blocks;
    attribute->value.cluster.y = attribute->value.cluster.z = 1;
}

void step_add_cooperative(Step* step) { add(step, ATTRIBUTE_COOPERATIVE)->value.cooperative = 1; }

void step_add_programmatic(Step* step) { add(step, ATTRIBUTE_PROGRAMMATIC)->value.programmatic = 1; }

uint32_t step_cluster(const Step* step) {
    for (uint32_t i = 0; i < step->config.attribute_count; i++)
        if (step->attributes[i].id == ATTRIBUTE_CLUSTER) return step->attributes[i].value.cluster.x;
    return 1;
}

int64_t rule_blocks(const Rule* rule, const int32_t* symbols) {
    // symbol, times and repeat are below 2^31, so the first product cannot overflow, the second can
    const int64_t whole = (symbols[rule->symbol] * rule->times + rule->of_each - 1) / rule->of_each;
    int64_t blocks;
    return __builtin_mul_overflow(whole > 1 ? whole : 1, rule->repeat, &blocks) ? INT64_MAX : blocks;
}

int plan_resolve(Plan* plan, const int32_t* symbols, int* bad) {
    if (plan->resolved && memcmp(plan->symbols, symbols, sizeof plan->symbols) == 0) return 0;
    for (int i = 0; i < plan->rule_count; i++) {
        const Rule* rule = &plan->rules[i];
        const int64_t blocks = rule_blocks(rule, symbols);
        const int64_t most = rule->axis == 0 ? MAX_GRID_X : MAX_GRID_YZ;
        if (blocks > most || (rule->axis == 0 && blocks % step_cluster(&plan->steps[rule->step]))) {
            *bad = i;
            return -1;
        }
    }
    for (int i = 0; i < plan->rule_count; i++) {
        const Rule* rule = &plan->rules[i];
        plan->steps[rule->step].config.grid[rule->axis] = (uint32_t)rule_blocks(rule, symbols);
    }
    for (int i = 0; i < plan->patch_count; i++) *plan->patches[i].target = symbols[plan->patches[i].symbol];
    memcpy(plan->symbols, symbols, sizeof plan->symbols);
    plan->resolved = 1;
    return 0;
}

Status step_launch(Step* step, const Driver* driver, Stream stream) {
    LaunchConfig* c = &step->config;
    c->stream = stream;
    if (driver->launch_ex) return driver->launch_ex(c, step->function, step->arguments, NULL);
    return driver->launch(step->function, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                          c->shared_bytes, c->stream, step->arguments, NULL);
}

Status plan_launch(Plan* plan, const Driver* driver, Stream stream, int checked, int* at) {
    for (int i = 0; i < plan->step_count; i++) {
        Status status = step_launch(&plan->steps[i], driver, stream);
        if (checked && status == SUCCESS) status = driver->stream_synchronize(stream);
        if (status != SUCCESS) {
            *at = i;
            return status;
        }
    }
    return SUCCESS;
}
