// Where the time of a layer goes.
#pragma once

// -D PROFILE: the clock of each block's first thread at these points of its last layer, behind the words of the launch.
#if defined(PROFILE)
constexpr int PROFILE_AT = 1 << 19, MARKS = 32;
#define MARK(point) mark(point)
#define WORKER_MARK(point) worker.mark(point)
#else
#define MARK(point)
#define WORKER_MARK(point)
#endif
