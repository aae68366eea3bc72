"""What a process may still take of the host's memory: what the host has, and what its cgroups leave."""

import pytest

from teq.device import host_memory, memory

GB = 10**9


@pytest.fixture
def host(tmp_path):
    """Write the files of a host below a folder: `host({path: content})` -> the folder."""

    def written(files, cgroup, mounts):
        meminfo = f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {50 * GB // 1024} kB\n"
        files = {
            "proc/meminfo": meminfo,
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts,
        } | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return written


def v2(folder, limit, used, cache=0):
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon {used - cache}\ninactive_file {cache}\nactive_file 0\n",
    }


def v1(folder, limit, used, cache=0):
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{used}\n",
        f"memory/{folder}memory.stat": f"cache {cache}\ninactive_file 0\ntotal_inactive_file {cache}\n",
    }


V2 = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 22 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 22 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
NONE = 9223372036854771712  # how version 1 spells no limit


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (v2("job/step/", 32 * GB, 2 * GB), 30 * GB),
        (v2("job/step/", 32 * GB, 12 * GB, cache=10 * GB), 30 * GB),  # the page cache is given back
        (v2("job/step/", "max", 2 * GB), 50 * GB),
        (v2("job/step/", "max", 2 * GB) | v2("job/", 16 * GB, 6 * GB), 10 * GB),
        (v2("job/step/", 8 * GB, 1 * GB) | v2("job/", 16 * GB, 6 * GB), 7 * GB),
        (v2("job/step/", 8 * GB, 1 * GB) | v2("job/", 16 * GB, 14 * GB), 2 * GB),
        (v2("job/step/", 8 * GB, 9 * GB), 0),
        (v2("job/step/", 320 * GB, 2 * GB), 50 * GB),  # the host has less
        ({}, 50 * GB),
    ],
)
def test_version_2_at_every_level(host, files, left):
    root = host(files, "0::/job/step\n", V2)
    assert host_memory.available(root) == pytest.approx(left, abs=1024)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (v1("job/step/", 32 * GB, 12 * GB, cache=10 * GB), 30 * GB),
        (v1("job/step/", NONE, 2 * GB) | v1("", NONE, 5 * GB), 50 * GB),
        (v1("job/step/", NONE, 2 * GB) | v1("job/", 16 * GB, 6 * GB), 10 * GB),
        (v1("job/step/", 8 * GB, 1 * GB) | v1("", 9 * GB, 7 * GB), 2 * GB),
    ],
)
def test_version_1_at_every_level(host, files, left):
    root = host(files, "5:cpu,cpuacct:/elsewhere\n4:memory:/job/step\n0::/job/step\n", V1)
    assert host_memory.available(root) == pytest.approx(left, abs=1024)


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_a_container_sees_its_own_cgroup_at_the_mount(host, path):
    mount = V1.replace("0:28 /", f"0:28 {path}")
    root = host(v1("", 4 * GB, 1 * GB), "4:memory:/docker/abc\n", mount)
    assert host_memory.available(root) == 3 * GB


def test_a_system_that_says_nothing_has_all_its_memory(tmp_path):
    assert host_memory.available(tmp_path) == host_memory._physical()


def test_the_budget_of_a_cpu_is_what_is_available(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 10 * GB)
    assert memory.budget("auto", "cpu") == 9 * GB
