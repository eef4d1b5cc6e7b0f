// What newer libstdc++ and glibc export and those of a manylinux_2_28 system lack, for the wheel
// (tools/glibc.py). Each is written in terms of what the older ones export, and stays hidden.

#include <cxxabi.h>

#include <exception>
#include <new>

// Where glibc has it, 1 lets std::shared_ptr count without atomics; 0 is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// GLIBCXX_3.4.29. By its mangled name: the headers of GCC 10 and older do not declare it.
extern "C" __attribute__((visibility("hidden"), noreturn)) void throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { __cxxabiv1::__cxa_throw_bad_array_new_length(); }

// CXXABI_1.3.13: what the copy constructor and the destructor of CXXABI_1.3.3 do inside. An
// exception_ptr is one pointer; a copy of its bits that nobody destroys leaves the count alone.
extern "C" {
void copy_exception_ptr(void** self, void* const* other) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy_exception_ptr(void** self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
__attribute__((visibility("hidden"))) void exception_ptr_addref(void** self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__attribute__((visibility("hidden"))) void exception_ptr_release(void** self) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
}
static_assert(sizeof(std::exception_ptr) == sizeof(void*));

void exception_ptr_addref(void** self) {
  void* counted;
  copy_exception_ptr(&counted, self);
}

void exception_ptr_release(void** self) { destroy_exception_ptr(self); }
