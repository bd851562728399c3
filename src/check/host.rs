//! The table of `check`: what this host has and lacks for guests, and what to do about it. Everything is read from
//! files; nothing is changed.

use std::{
    fmt::{self, Write},
    fs,
    path::PathBuf,
};

/// The lowest `kernel.pid_max` that suffices for a node with many pods, each of which has several processes.
const MIN_PID_MAX: u64 = 1 << 16;

/// The lowest `fs.file-max` that suffices for such a node.
const MIN_FILE_MAX: u64 = 1 << 18;

/// The first kernel whose BPF programs can select the socket of a connection, which port forwarding to loopback uses.
const SOCKET_LOOKUP_KERNEL: (u32, u32) = (5, 9);

/// One line of the table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    subject: &'static str,
    state: String,
    /// What to do about it; `None` if the state is good.
    advice: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, state: impl Into<String>) -> Self {
        Self {
            subject,
            state: state.into(),
            advice: None,
        }
    }

    fn not_good(subject: &'static str, state: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            advice: Some(advice.into()),
            ..Self::good(subject, state)
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subject, state, advice } = self;
        match advice {
            None => write!(formatter, "{subject:<16} good      {state}"),
            Some(advice) => write!(formatter, "{subject:<16} not good  {state}: {advice}"),
        }
    }
}

/// A host whose files are below a directory, `/` except in tests.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// The host whose files are below `root`.
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(super) fn examine(&self) -> Vec<Finding> {
        let mut findings = vec![
            self.virtualization(),
            self.cgroups(),
            self.nx_huge_pages(),
            self.transparent_huge_pages(),
            self.vulnerabilities(),
            self.simultaneous_multithreading(),
            self.same_page_merging(),
            self.userfaultfd(),
            self.landlock(),
            self.minimum("process ids", "proc/sys/kernel/pid_max", MIN_PID_MAX, "kernel.pid_max"),
            self.minimum("open files", "proc/sys/fs/file-max", MIN_FILE_MAX, "fs.file-max"),
            self.tap_devices(),
            self.socket_lookup(),
            self.containerd(),
        ];
        findings.extend(self.favordynmods());
        findings
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The content of a file without spaces around it; `None` if it cannot be read.
    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    fn virtualization(&self) -> Finding {
        const SUBJECT: &str = "virtualization";
        let cpu = self.read("proc/cpuinfo").unwrap_or_default();
        if cpu.split_ascii_whitespace().any(|flag| flag == "hypervisor") {
            Finding::not_good(
                SUBJECT,
                "this host is a virtual machine itself",
                "guests run nested, and start and do I/O more slowly than on hardware",
            )
        } else {
            Finding::good(SUBJECT, "guests run on the hardware")
        }
    }

    fn cgroups(&self) -> Finding {
        const SUBJECT: &str = "control groups";
        if self.path("sys/fs/cgroup/cgroup.controllers").exists() {
            Finding::good(SUBJECT, "version 2")
        } else {
            Finding::not_good(
                SUBJECT,
                "version 1",
                "machines are not counted in the groups of their pods; boot with systemd.unified_cgroup_hierarchy=1",
            )
        }
    }

    /// `None` with cgroup v1, where the option does not matter.
    fn favordynmods(&self) -> Option<Finding> {
        const SUBJECT: &str = "favordynmods";
        let mounts = self.read("proc/self/mountinfo").unwrap_or_default();
        let mount = mounts
            .lines()
            .find(|line| line.contains(" /sys/fs/cgroup ") && line.contains(" - cgroup2 "))?;
        Some(if mount.contains("favordynmods") {
            Finding::good(SUBJECT, "set")
        } else {
            Finding::not_good(
                SUBJECT,
                "not set",
                "processes move to their group slowly; mount -o remount,favordynmods /sys/fs/cgroup (Linux 6.0 or later)",
            )
        })
    }

    /// `nx_huge_pages` (kernel, `Documentation/admin-guide/hw-vuln/multihit.rst`).
    fn nx_huge_pages(&self) -> Finding {
        const SUBJECT: &str = "nx_huge_pages";
        match self.read("sys/module/kvm/parameters/nx_huge_pages").as_deref() {
            Some("Y" | "force" | "auto") => Finding::not_good(
                SUBJECT,
                "on",
                "the CPU is affected by iTLB multihit, and KVM splits the huge pages of guests; leave it on, or use \
                 another CPU",
            ),
            Some(_) => Finding::good(SUBJECT, "off"),
            None => Finding::good(SUBJECT, "this kernel has no such setting"),
        }
    }

    fn transparent_huge_pages(&self) -> Finding {
        const SUBJECT: &str = "huge pages";
        match self.read("sys/kernel/mm/transparent_hugepage/enabled").as_deref() {
            Some(modes) if modes.contains("[never]") => Finding::not_good(
                SUBJECT,
                "never",
                "guests use their memory faster with huge pages; echo madvise \
                 >/sys/kernel/mm/transparent_hugepage/enabled",
            ),
            Some(modes) => {
                let mode = modes.split(['[', ']']).nth(1).unwrap_or(modes);
                Finding::good(SUBJECT, mode)
            }
            None => Finding::good(SUBJECT, "this kernel has none"),
        }
    }

    fn vulnerabilities(&self) -> Finding {
        const SUBJECT: &str = "vulnerabilities";
        let folder = self.path("sys/devices/system/cpu/vulnerabilities");
        let mut open: Vec<String> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let is_open = fs::read_to_string(&path).ok()?.starts_with("Vulnerable");
                is_open.then(|| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
            })
            .collect();
        open.sort();
        if open.is_empty() {
            Finding::good(SUBJECT, "the kernel reports none without mitigation")
        } else {
            Finding::not_good(
                SUBJECT,
                open.join(", "),
                "a guest may read memory of the host; update microcode and kernel, and do not boot with mitigations=off",
            )
        }
    }

    fn simultaneous_multithreading(&self) -> Finding {
        self.switch(
            ("SMT", "sys/devices/system/cpu/smt/active"),
            ("on", "off"),
            "guests on two threads of a core can observe each other; boot with nosmt, or set SCHED_CORE in the \
             environment of containerd",
        )
    }

    fn same_page_merging(&self) -> Finding {
        self.switch(
            ("KSM", "sys/kernel/mm/ksm/run"),
            ("on", "off"),
            "equal pages of different guests are shared, which reveals their content; echo 2 >/sys/kernel/mm/ksm/run",
        )
    }

    fn userfaultfd(&self) -> Finding {
        self.switch(
            ("userfaultfd", "proc/sys/vm/unprivileged_userfaultfd"),
            ("for every user", "for root only"),
            "it makes flaws of the kernel easier to exploit; sysctl -w vm.unprivileged_userfaultfd=0",
        )
    }

    fn landlock(&self) -> Finding {
        const SUBJECT: &str = "Landlock";
        match self.read("sys/kernel/security/lsm") {
            Some(modules) if modules.split(',').any(|module| module == "landlock") => Finding::good(SUBJECT, "on"),
            Some(modules) => Finding::not_good(
                SUBJECT,
                "off",
                format!("the processes of a pod have one limit less; boot with lsm=landlock,{modules}"),
            ),
            None => Finding::not_good(
                SUBJECT,
                "unknown",
                "mount -t securityfs securityfs /sys/kernel/security, and check again",
            ),
        }
    }

    /// A setting that should not be on, which is "1" in its file.
    fn switch(&self, (subject, path): (&'static str, &str), (on, off): (&str, &str), advice: &str) -> Finding {
        if self.read(path).as_deref() == Some("1") {
            Finding::not_good(subject, on, advice)
        } else {
            Finding::good(subject, off)
        }
    }

    fn minimum(&self, subject: &'static str, path: &str, minimum: u64, name: &str) -> Finding {
        match self.read(path).and_then(|value| value.parse::<u64>().ok()) {
            Some(value) if value < minimum => Finding::not_good(
                subject,
                format!("at most {value}"),
                format!("too few for a node with many pods; sysctl -w {name}={minimum}"),
            ),
            Some(value) => Finding::good(subject, format!("at most {value}")),
            None => Finding::not_good(subject, format!("{name} cannot be read"), "mount /proc"),
        }
    }

    fn tap_devices(&self) -> Finding {
        const SUBJECT: &str = "tap devices";
        if self.path("dev/net/tun").exists() {
            Finding::good(SUBJECT, "/dev/net/tun")
        } else {
            Finding::not_good(SUBJECT, "/dev/net/tun does not exist", "modprobe tun")
        }
    }

    fn socket_lookup(&self) -> Finding {
        const SUBJECT: &str = "sk_lookup";
        let release = self.read("proc/sys/kernel/osrelease").unwrap_or_default();
        let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version >= SOCKET_LOOKUP_KERNEL {
            Finding::good(SUBJECT, format!("Linux {release}"))
        } else {
            Finding::not_good(
                SUBJECT,
                format!("Linux {release}"),
                "ports of a pod's loopback interface cannot be forwarded (kubectl port-forward); use Linux 5.9 or later",
            )
        }
    }

    fn containerd(&self) -> Finding {
        const SUBJECT: &str = "containerd";
        const CONFIGURATION: &str = "etc/containerd/config.toml";
        let programs = ["usr/bin/containerd", "usr/local/bin/containerd", "bin/containerd"];
        if !programs.iter().any(|program| self.path(program).exists()) {
            return Finding::not_good(
                SUBJECT,
                "not found in /usr/bin and /usr/local/bin",
                "install containerd 1.7 to 2.4",
            );
        }
        let text = self.read(CONFIGURATION).unwrap_or_default();
        let imports = fs::read_dir(self.path("etc/containerd/conf.d")).into_iter().flatten();
        let mut texts = imports.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        let is_handler = |text: &str| text.contains("io.containerd.nutshell.v2");
        if is_handler(&text) || texts.any(|text| is_handler(&text)) {
            Finding::good(SUBJECT, "has a runtime handler for Kubernetes")
        } else {
            Finding::not_good(
                SUBJECT,
                "has no runtime handler",
                "only Kubernetes needs one: see docs/KUBERNETES.md; ctr and nerdctl do not",
            )
        }
    }
}

/// The findings as a table, one in a line.
pub(super) fn table(findings: &[Finding]) -> String {
    let mut table = String::new();
    for finding in findings {
        // Writing to a string cannot fail.
        let _ = writeln!(table, "{finding}");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let host = Host::at(folder.path());
        (folder, host)
    }

    fn subjects_that_are_not_good(host: &Host) -> Vec<&'static str> {
        let findings = host.examine();
        let not_good = findings.iter().filter(|finding| finding.advice.is_some());
        not_good.map(|finding| finding.subject).collect()
    }

    const GOOD: [(&str, &str); 14] = [
        ("proc/cpuinfo", "flags : fpu vmx\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory\n"),
        (
            "proc/self/mountinfo",
            "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,favordynmods\n",
        ),
        ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        (
            "sys/devices/system/cpu/vulnerabilities/mds",
            "Mitigation: Clear CPU buffers\n",
        ),
        ("sys/devices/system/cpu/smt/active", "0\n"),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("sys/kernel/security/lsm", "lockdown,landlock,yama"),
        ("proc/sys/kernel/pid_max", "4194304\n"),
        ("proc/sys/fs/file-max", "9223372036854775807\n"),
        ("dev/net/tun", ""),
        ("proc/sys/kernel/osrelease", "6.12.117\n"),
        ("usr/bin/containerd", ""),
    ];

    const HANDLER: (&str, &str) = (
        "etc/containerd/config.toml",
        "runtime_type = \"io.containerd.nutshell.v2\"\n",
    );

    #[test]
    fn good_host_needs_no_advice() {
        let mut files = GOOD.to_vec();
        files.push(HANDLER);
        let (_folder, host) = host(&files);
        assert_eq!(subjects_that_are_not_good(&host), Vec::<&str>::new());
    }

    #[test]
    fn each_shortcoming_is_named() {
        for (path, content, subject) in [
            ("proc/cpuinfo", "flags : fpu vmx hypervisor\n", "virtualization"),
            ("sys/module/kvm/parameters/nx_huge_pages", "Y\n", "nx_huge_pages"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]\n",
                "huge pages",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Vulnerable; SMT vulnerable\n",
                "vulnerabilities",
            ),
            ("sys/devices/system/cpu/smt/active", "1\n", "SMT"),
            ("sys/kernel/mm/ksm/run", "1\n", "KSM"),
            ("proc/sys/vm/unprivileged_userfaultfd", "1\n", "userfaultfd"),
            ("sys/kernel/security/lsm", "lockdown,yama", "Landlock"),
            ("proc/sys/kernel/pid_max", "32768\n", "process ids"),
            ("proc/sys/fs/file-max", "1000\n", "open files"),
            ("proc/sys/kernel/osrelease", "5.4.0-generic\n", "sk_lookup"),
            ("etc/containerd/config.toml", "version = 3\n", "containerd"),
            (
                "proc/self/mountinfo",
                "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                "favordynmods",
            ),
        ] {
            let mut files = GOOD.to_vec();
            files.push(HANDLER);
            files.push((path, content));
            let (_folder, host) = host(&files);
            assert_eq!(subjects_that_are_not_good(&host), [subject]);
        }
        let (_folder, host) = host(&[]);
        let missing = subjects_that_are_not_good(&host);
        assert_eq!(
            missing,
            [
                "control groups",
                "Landlock",
                "process ids",
                "open files",
                "tap devices",
                "sk_lookup",
                "containerd"
            ]
        );
    }

    #[test]
    fn table_has_a_line_for_each_finding() {
        let findings = [
            Finding::good("KSM", "off"),
            Finding::not_good("SMT", "on", "boot with nosmt"),
        ];
        assert_eq!(
            table(&findings),
            "KSM              good      off\nSMT              not good  on: boot with nosmt\n"
        );
    }
}
