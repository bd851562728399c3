use std::{
    env,
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::Path,
};

use super::guest::{Guest, VCPUS, kernels, release};
use crate::{
    control::{EndReason, GUEST_AGENT_PORT, Lease, LinkConfig, Prefix},
    devices::virtio::net::tests::kernel::{create_tap, in_new_namespace},
};

/// A disk of 1 MiB that begins with `content`.
fn disk(content: &[u8]) -> File {
    let mut disk = tempfile::tempfile().unwrap();
    disk.write_all(content).unwrap();
    disk.set_len(1 << 20).unwrap();
    disk
}

/// A link with a lease, and the queue of its tap device, which is new in the thread's network namespace.
fn link() -> (LinkConfig, OwnedFd) {
    let lease = Lease {
        address: Prefix::host([10, 2, 3, 4].into()),
        gateway: Some([169, 254, 1, 1].into()),
        routes: Vec::new(),
        dns: Vec::new(),
        search: Vec::new(),
        hostname: None,
        mtu: 1500,
    };
    let link = LinkConfig {
        mac: [2, 0, 0, 0, 0, 7],
        mtu: 1500,
        queues: 1,
        lease: Some(lease),
    };
    (link, create_tap(1).remove(0))
}

/// The lease of [`link`], as a DHCP client in the guest gets it.
fn read_lease(guest: &mut Guest) -> String {
    guest.run("printf '#!/bin/sh\\n[ $1 = bound ] && env >/run/lease\\ntrue\\n' >/run/script; chmod +x /run/script");
    guest.run("ip link set eth0 up; udhcpc -f -q -n -i eth0 -O staticroutes -s /run/script 2>/dev/null");
    guest.run("grep -E '^(ip|mask|router|staticroutes)=' /run/lease | sort")
}

#[test]
#[ignore = "needs a /dev/kvm that can boot unmodified kernels of distributions: run tests/pc/run-in-lab"]
fn distribution_kernel_finds_vcpus_and_devices_uses_msi_and_dhcp_and_reboots() {
    for kernel in kernels() {
        in_new_namespace(move || use_devices_and_reboot(&kernel));
    }
}

fn use_devices_and_reboot(kernel: &Path) {
    let name = release(kernel);
    let mut guest = Guest::boot(kernel, vec![disk(b"first"), disk(b"second")], vec![link()]);

    assert_eq!(guest.run("nproc").trim(), VCPUS.to_string(), "{name}");
    let interrupts = guest.run("cat /proc/interrupts");
    for device in ["virtio0-", "virtio1-", "virtio2-", "virtio3-"] {
        let line = interrupts.lines().find(|line| line.contains(device));
        let line = line.unwrap_or_else(|| panic!("{name}: no interrupt of {device}: {interrupts}"));
        assert!(line.contains("MSI"), "{name}: {line}");
    }
    assert_eq!(
        guest.run("head -c 5 /dev/vda; head -c 6 /dev/vdb"),
        "firstsecond",
        "{name}"
    );
    guest.run("echo written | dd of=/dev/vdb bs=512 seek=1 conv=fsync 2>/dev/null");
    let read_back = guest.run("dd if=/dev/vdb bs=512 skip=1 count=1 iflag=direct 2>/dev/null | head -c 7");
    assert_eq!(read_back, "written", "{name}");
    assert_eq!(
        read_lease(&mut guest),
        "ip=10.2.3.4\nmask=32\nrouter=169.254.1.1\nstaticroutes=169.254.1.1/32 0.0.0.0 0.0.0.0/0 169.254.1.1\n",
        "{name}"
    );
    let random = guest.run("head -c 16 /dev/hwrng | wc -c");
    assert_eq!(random.trim(), "16", "{name}");
    let tables = guest.run("ls /sys/firmware/acpi/tables");
    for table in ["APIC", "DSDT", "FACP", "MCFG"] {
        assert!(tables.contains(table), "{name}: {tables}");
    }
    let errors = guest.run("dmesg | grep -iE 'acpi.*(error|warn)|BAR.*(error|fail)|pci.*can.t' | head -n 20; true");
    assert_eq!(errors, "", "{name}");

    // The kernel removes the device and finds it again. It may assign another address to the device's BAR.
    let device = guest.run("basename $(readlink -f /sys/block/vda/device/..)");
    let device = device.trim();
    guest.run(&format!("echo 1 >/sys/bus/pci/devices/{device}/remove"));
    guest.run("echo 1 >/sys/bus/pci/rescan");
    assert_eq!(guest.run("head -c 5 /dev/vda"), "first", "{name}");

    guest.write("reboot -f");
    assert_eq!(guest.end(), EndReason::GuestReset, "{name}");
}

#[test]
#[ignore = "needs a /dev/kvm that can boot unmodified kernels of distributions: run tests/pc/run-in-lab"]
fn port_of_the_guest_agent_has_its_name_and_carries_bytes() {
    const FLOOD: usize = 2_000_000;
    for kernel in kernels() {
        let name = release(&kernel);
        let mut guest = Guest::boot(&kernel, Vec::new(), Vec::new());
        let ports = guest.run("cat /sys/class/virtio-ports/*/name");
        assert_eq!(ports, format!("{GUEST_AGENT_PORT}\n"), "{name}");
        assert!(!guest.has_agent_port_open(), "{name}");
        guest.agent_port.write_all(b"dropped\n").unwrap();

        guest.run("exec 3<>/dev/$(basename /sys/class/virtio-ports/*)");
        assert!(guest.has_agent_port_open(), "{name}");
        guest.agent_port.write_all(b"hello guest\n").unwrap();
        assert_eq!(guest.run("read -r line <&3; echo \"$line\""), "hello guest\n", "{name}");
        guest.run("echo hello host >&3");
        let mut line = [0; 11];
        guest.agent_port.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"hello host\n", "{name}");

        // The guest writes more than the socket and the queue can hold, and waits for the host.
        guest.run(&format!("(head -c {FLOOD} /dev/zero >&3; echo over >/run/flood) &"));
        assert_eq!(guest.run("cat /run/flood 2>/dev/null; true"), "", "{name}");
        guest.agent_port.read_exact(&mut vec![0; FLOOD]).unwrap();
        assert_eq!(guest.run("wait; cat /run/flood"), "over\n", "{name}");

        guest.run("exec 3>&-");
        assert!(!guest.has_agent_port_open(), "{name}");
        guest.write("poweroff -f");
        assert_eq!(guest.end(), EndReason::GuestPowerOff, "{name}");
    }
}

#[test]
#[ignore = "needs a /dev/kvm that can boot unmodified kernels of distributions: run tests/pc/run-in-lab"]
fn power_button_reaches_the_guest() {
    for kernel in kernels() {
        let name = release(&kernel);
        let mut guest = Guest::boot(&kernel, Vec::new(), Vec::new());
        // The shell itself opens the devices, before it starts the background processes that read them: an event that
        // arrives before the open is lost.
        guest.run("for i in /dev/input/event*; do exec 3<$i; (head -c 24 <&3 >/dev/null && poweroff -f) & done");

        guest.press_power_button();

        assert_eq!(guest.end(), EndReason::GuestPowerOff, "{name}");
    }
}

#[test]
#[ignore = "needs a /dev/kvm that can boot unmodified kernels of distributions: run tests/pc/run-in-lab"]
fn every_reboot_succeeds() {
    let count = env::var("NUTSHELL_TEST_REBOOTS").expect("set NUTSHELL_TEST_REBOOTS to the number of reboots");
    let count = count.parse().unwrap();
    for kernel in kernels() {
        for round in 0..count {
            let mut guest = Guest::boot(&kernel, vec![disk(b"root")], Vec::new());
            guest.write("reboot -f");
            assert_eq!(guest.end(), EndReason::GuestReset, "{} round {round}", release(&kernel));
        }
    }
}
