// How much CPU time the process's control groups leave to it.
#pragma once

#include <string>

namespace hmoe {

// Whole CPUs that the smallest quota of the process's groups and their parents pays for, at least 1; `none`
// where there is no quota. Reads cgroups of version 2 and 1 below `root`/proc and `root`/sys.
int QuotaCpus(const std::string& root, int none);

}  // namespace hmoe
