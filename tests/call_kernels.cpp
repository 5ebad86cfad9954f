// Calls functions of libraries with numbers in memory that another process sees as well, at the same addresses. It reads lines:
//   map FILE ADDRESS SIZE                    the memory they share
//   store ADDRESS LIBRARY FUNCTION           puts a function's address there
//   call LIBRARY FUNCTION FLOAT NUMBERS...   up to ten whole numbers and addresses, and the one float that is among the arguments
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

static void* find(const std::string& library, const std::string& function) {
  void* opened = dlopen(library.c_str(), RTLD_NOW);
  void* found = opened ? dlsym(opened, function.c_str()) : nullptr;
  if (!found) std::cerr << dlerror() << "\n", exit(1);
  return found;
}

int main() {
  for (std::string line, what, first, second; std::getline(std::cin, line);) {
    std::istringstream words(line);
    words >> what >> first >> second;
    if (what == "map") {
      uint64_t place = std::stoull(second), size;
      words >> size;
      void* got = mmap((void*)place, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, open(first.c_str(), O_RDWR), 0);
      if (got != (void*)place) return perror("mmap"), 1;
    } else if (what == "store") {
      std::string function;
      words >> function;
      *(void**)std::stoull(first) = find(second, function);
    } else {
      float number;
      int64_t n[10] = {};
      words >> number;
      for (int64_t* to = n; words >> *to; to++) {}
      // ARM counts whole numbers and floats apart, so a float's place among the others does not matter
      typedef void Function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
      ((Function*)find(first, second))(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], number);
    }
  }
}
