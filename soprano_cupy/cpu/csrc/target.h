/* Compile what stands between TARGET_BEGIN and TARGET_END for an instruction set, whatever the compiler's flags. */
#ifndef SOPRANO_TARGET_H
#define SOPRANO_TARGET_H

#define TARGET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(set) \
    TARGET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(set) _Pragma("GCC push_options") TARGET_PRAGMA(GCC target(set))
#define TARGET_END _Pragma("GCC pop_options")
#endif

#endif
