/* Compile what stands between TARGET_BEGIN and TARGET_END for an instruction set, whatever the compiler's flags. */
#ifndef SOPRANO_TARGET_H
#define SOPRANO_TARGET_H

#define TARGET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(set) TARGET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(set) _Pragma("GCC push_options") TARGET_PRAGMA(GCC target(set))
#define TARGET_END _Pragma("GCC pop_options")
#endif

/* A product that must be rounded before it is added to something: no fused multiply-add takes it in. */
#if defined(__x86_64__)
#define ROUNDED(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) __asm__("" : "+w"(x))
#else
#define ROUNDED(x) (void)(x)
#endif

#endif
