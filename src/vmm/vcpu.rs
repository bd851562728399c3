//! A vCPU: a thread that runs the guest and passes its I/O accesses to the devices. The guest is hostile: it controls
//! every value that arrives here.

use std::{io, sync::Arc, thread};

use kvm_bindings::KVM_SYSTEM_EVENT_CRASH;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{end_signal::EndSignal, progress::BootProgress, system_calls};
use crate::{control::EndReason, devices::bus::Bus, jail::seccomp};

/// `KVM_INTERNAL_ERROR_EMULATION`: KVM could not emulate an instruction.
const INTERNAL_ERROR_EMULATION: u32 = 1;

/// The devices of a machine, which its vCPUs share.
#[derive(Debug)]
pub(super) struct Peripherals {
    /// Guest physical addresses.
    pub(super) bus: Bus,
    /// I/O ports.
    pub(super) ports: Bus,
    pub(super) progress: BootProgress,
}

/// Runs `vcpu` on a new thread until the machine ends.
pub(super) fn start(
    index: usize,
    mut vcpu: VcpuFd,
    peripherals: Arc<Peripherals>,
    end: Arc<EndSignal>,
) -> io::Result<()> {
    thread::Builder::new()
        .name(format!("vcpu {index}"))
        .stack_size(128 << 10)
        .spawn(move || {
            seccomp::confine_thread(&system_calls::VCPU);
            if let Some(reason) = run(&mut vcpu, &peripherals, &end) {
                end.report(reason);
            }
        })?;
    Ok(())
}

/// Returns why the machine ends. `None` if it has ended already.
fn run(vcpu: &mut VcpuFd, peripherals: &Peripherals, end: &EndSignal) -> Option<EndReason> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                peripherals.progress.record(address);
                peripherals.bus.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                peripherals.progress.record(address);
                peripherals.bus.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                peripherals.progress.record_first();
                peripherals.ports.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                peripherals.progress.record_first();
                peripherals.ports.write(port.into(), data);
                // A guest that has switched itself off must not go on writing to its console.
                if end.has_ended() {
                    return None;
                }
            }
            Ok(VcpuExit::InternalError) => return Some(internal_error(vcpu)),
            other => {
                if let Some(reason) = end_reason(&other) {
                    return Some(reason);
                }
            }
        }
    }
}

/// The reason for the end of the machine after this exit. `None` if the vCPU continues.
fn end_reason(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<EndReason> {
    match exit {
        Ok(VcpuExit::Shutdown) => Some(EndReason::GuestReset),
        Ok(VcpuExit::SystemEvent(kind, _)) if *kind != KVM_SYSTEM_EVENT_CRASH => Some(EndReason::GuestReset),
        Ok(VcpuExit::FailEntry(reason, cpu)) => Some(EndReason::KvmFailed(format!(
            "the processor refused to enter the guest (hardware reason {reason:#x} on CPU {cpu})"
        ))),
        Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => None,
        Ok(other) => Some(EndReason::KvmFailed(format!("unexpected KVM exit: {other:?}"))),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
        Err(error) => {
            let error = io::Error::from(*error);
            Some(EndReason::KvmFailed(format!("KVM_RUN: {error}")))
        }
    }
}

/// Returns the reason, in one line. An emulation failure usually means that the host cannot run any guest.
fn internal_error(vcpu: &mut VcpuFd) -> EndReason {
    let run = vcpu.get_kvm_run();
    // SAFETY: for the exit reason KVM_EXIT_INTERNAL_ERROR, `internal` is the active member of the union. Its fields are
    // integers.
    let (suberror, length, data) = unsafe {
        let internal = run.__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    let words = data.iter().take(length.min(16) as usize);
    let words: Vec<String> = words.map(|word| format!("{word:x}")).collect();
    let address = vcpu.get_regs().map_or(0, |regs| regs.rip);
    EndReason::KvmFailed(if suberror == INTERNAL_ERROR_EMULATION {
        format!(
            "this host's KVM cannot run Linux guests: it emulates the guest's kernel instead of running it on the \
             processor, and does not support the instruction at {address:#x} (emulation data {}); use a host with VT-x \
             or AMD-V, or enable nested virtualization in the hypervisor of this host",
            words.join(" ")
        )
    } else {
        format!(
            "KVM internal error {suberror} at {address:#x} (data {})",
            words.join(" ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_that_ends_the_machine_has_a_reason_with_the_cause() {
        let failed = |text: &str| Some(EndReason::KvmFailed(text.to_owned()));
        let errno = |errno| Err(kvm_ioctls::Error::new(errno));
        for (exit, expected) in [
            (Ok(VcpuExit::Shutdown), Some(EndReason::GuestReset)),
            (Ok(VcpuExit::Intr), None),
            (Ok(VcpuExit::Hlt), None),
            (errno(libc::EINTR), None),
            (errno(libc::EAGAIN), None),
            (errno(libc::EFAULT), failed("KVM_RUN: Bad address (os error 14)")),
            (
                Ok(VcpuExit::FailEntry(0x80, 3)),
                failed("the processor refused to enter the guest (hardware reason 0x80 on CPU 3)"),
            ),
            (Ok(VcpuExit::Debug(kvm_bindings::kvm_debug_exit_arch::default())), None),
        ] {
            let reason = end_reason(&exit);
            match exit {
                Ok(VcpuExit::Debug(_)) => {
                    let text = reason.unwrap().to_string();
                    assert!(text.starts_with("unexpected KVM exit: Debug"), "{text}");
                }
                _ => assert_eq!(reason, expected, "{exit:?}"),
            }
        }
    }
}
