// The name of this library's instructions, and whether they can be used here.
#include "product.h"

#if defined(AVX512) || defined(AVX2)
#include <cpuid.h>
#elif defined(NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

const char *chatglm_isa(void) {
#ifdef AMX
    if (chatglm_may_use_amx()) return "amx";
#endif
    return ISA;
}

// Whether the CPU has the instructions of this library, and the system saves their registers.
// __builtin_cpu_supports is not used, because it is always 0 with zig's clang.
int chatglm_runs_here(void) {
#if defined(AVX512) || defined(AVX2)
    unsigned eax, ebx, ecx, edx, saved;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    const unsigned wanted = bit_OSXSAVE | bit_FMA | bit_F16C;
    if ((ecx & wanted) != wanted || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
#ifdef AVX512
    const unsigned registers = 0xe6, in_ebx = bit_AVX512F | bit_AVX512BW, in_ecx = bit_AVX512VNNI;
#else
    const unsigned registers = 0x06, in_ebx = bit_AVX2, in_ecx = 0;
#endif
    if ((saved & registers) != registers || (ebx & in_ebx) != in_ebx || (ecx & in_ecx) != in_ecx)
        return 0;
#ifdef AVXVNNI
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & bit_AVXVNNI)) return 0;
#endif
#elif defined(NEON) && defined(__linux__)
    if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) return 0;
#ifdef I8MM
    if (!(getauxval(AT_HWCAP2) & HWCAP2_I8MM)) return 0;
#endif
#elif defined(I8MM) && defined(__APPLE__)  // all have the other instructions
    int has_i8mm = 0;
    size_t size = sizeof has_i8mm;
    sysctlbyname("hw.optional.arm.FEAT_I8MM", &has_i8mm, &size, NULL, 0);
    if (!has_i8mm) return 0;
#endif
    return 1;
}
