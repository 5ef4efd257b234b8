#include "machine/cgroup.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string_view>
#include <vector>

namespace hmoe {
namespace {

// Where a hierarchy with the CPU controller is mounted, and which of its groups is seen there.
struct Mount {
  bool is_v2;
  std::string root;
  std::string point;
};

bool HasItem(const std::string& comma_separated, std::string_view wanted) {
  std::istringstream items(comma_separated);
  for (std::string item; std::getline(items, item, ',');) {
    if (item == wanted) return true;
  }
  return false;
}

// A line of mountinfo: "36 35 0:30 /root /mount/point options - type source super,options", with any number
// of optional fields before the dash (man proc_pid_mountinfo).
std::vector<Mount> CpuMounts(const std::string& root) {
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string skipped, type, source, options;
    Mount mount;
    fields >> skipped >> skipped >> skipped >> mount.root >> mount.point;
    while (fields >> skipped && skipped != "-") {
    }
    fields >> type >> source >> options;
    mount.is_v2 = type == "cgroup2";
    if (mount.is_v2 || (type == "cgroup" && HasItem(options, "cpu"))) mounts.push_back(mount);
  }
  return mounts;
}

// The process's group in the mount's hierarchy: a line of /proc/self/cgroup is "number:controllers:/group",
// with no controllers for version 2.
std::string GroupIn(const Mount& mount, const std::string& root) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (mount.is_v2 ? controllers.empty() : HasItem(controllers, "cpu")) return line.substr(second + 1);
  }
  return "/";
}

double QuotaOf(const std::string& folder, bool is_v2) {
  double quota = -1, period = 0;  // version 1 says -1 for none, version 2 "max", which is not a number
  if (is_v2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : -1;
}

}  // namespace

int QuotaCpus(const std::string& root, int none) {
  double smallest = none;
  for (const Mount& mount : CpuMounts(root)) {
    std::string group = GroupIn(mount, root);
    // A container may see its own group as the top of the mount while the group's name counts from the
    // host's.
    if (mount.root != "/" && group.starts_with(mount.root)) group.erase(0, mount.root.size());
    // From the group up to the top. A folder that is not there has no quota.
    for (size_t length = group.size(); length != std::string::npos;
         length = length == 0 ? length - 1 : group.rfind('/', length - 1)) {
      const double quota = QuotaOf(root + mount.point + group.substr(0, length), mount.is_v2);
      if (quota > 0) smallest = std::min(smallest, quota);
    }
  }
  return std::max(1, static_cast<int>(smallest));
}

}  // namespace hmoe
