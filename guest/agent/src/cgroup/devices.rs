//! Restricts a container's access to devices: compiles the spec's rules to a BPF program and attaches it to the cgroup.
//!
//! A pod's machine has the disks of several containers. Without the program, a container with the capability to create
//! device nodes could open the disks of the others. The program is of type BPF_PROG_TYPE_CGROUP_DEVICE (cgroup v2,
//! "Device controller").

use std::fs::File;
use std::io;

use nutshell_linux::bpf::Instruction;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::Cgroup;
use crate::sys;

/// Access bits in the program's context: `BPF_DEVCG_ACC_*` of `linux/bpf.h`.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// Device types in the program's context: `BPF_DEVCG_DEV_*` of `linux/bpf.h`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// One device rule. `None` matches any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    const fn allowed(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    fn matches_everything(self) -> bool {
        let Self { kind, major, minor, .. } = self;
        (kind, major, minor, self.access) == (None, None, None, MKNOD | READ | WRITE)
    }
}

/// Rules that every container has, as with runc 1.2.4 (`AllowedDevices` of its libcontainer/specconv): it may create
/// any device node, and open those that are in every container's `/dev`, and `/dev/net/tun`.
const ALWAYS_ALLOWED: [Rule; 11] = {
    const ANY: i32 = MKNOD | READ | WRITE;
    [
        Rule::allowed(BLOCK, None, None, MKNOD),
        Rule::allowed(CHARACTER, None, None, MKNOD),
        Rule::allowed(CHARACTER, Some(1), Some(3), ANY),    // null
        Rule::allowed(CHARACTER, Some(1), Some(5), ANY),    // zero
        Rule::allowed(CHARACTER, Some(1), Some(7), ANY),    // full
        Rule::allowed(CHARACTER, Some(1), Some(8), ANY),    // random
        Rule::allowed(CHARACTER, Some(1), Some(9), ANY),    // urandom
        Rule::allowed(CHARACTER, Some(5), Some(0), ANY),    // tty
        Rule::allowed(CHARACTER, Some(5), Some(2), ANY),    // ptmx
        Rule::allowed(CHARACTER, Some(10), Some(200), ANY), // net/tun
        Rule::allowed(CHARACTER, Some(136), None, ANY),     // pts
    ]
};

/// Restricts the processes of `cgroup` to the devices that `rules` and [`ALWAYS_ALLOWED`] allow. The last matching rule
/// decides.
pub(crate) fn confine(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    let rules: Vec<Rule> = rules.iter().filter_map(parse).collect();
    if is_unconfined(&rules) {
        return Ok(());
    }
    let program = sys::load_device_program(&compile(rules.iter().chain(&ALWAYS_ALLOWED)))?;
    sys::attach_device_program(&program, &File::open(cgroup.path())?)
}

/// Converts a rule of the spec. Returns `None` for one that matches no device.
fn parse(rule: &LinuxDeviceCgroup) -> Option<Rule> {
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => return None,
    };
    let number = |number: Option<i64>| {
        number
            .filter(|number| *number >= 0)
            .and_then(|number| i32::try_from(number).ok())
    };
    let text = rule.access().as_deref().unwrap_or("rwm");
    let access = [('m', MKNOD), ('r', READ), ('w', WRITE)]
        .iter()
        .filter(|(letter, _)| text.contains(*letter))
        .fold(0, |access, (_, bit)| access | bit);
    (access != 0).then_some(Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major()),
        minor: number(rule.minor()),
        access,
    })
}

/// Whether the rules allow every access: the last rule that matches everything allows it, and no later rule denies
/// anything. As with runc, a container without rules has only [`ALWAYS_ALLOWED`].
fn is_unconfined(rules: &[Rule]) -> bool {
    let from = rules.iter().rposition(|rule| rule.matches_everything());
    from.is_some_and(|from| rules[from..].iter().all(|rule| rule.allow))
}

/// Compiles rules to a program that applies the last matching rule, and denies the access if none matches.
///
/// The program's context is `struct bpf_cgroup_dev_ctx` of `linux/bpf.h`: type (low half) and access (high half),
/// major, minor.
fn compile<'a>(rules: impl DoubleEndedIterator<Item = &'a Rule>) -> Vec<Instruction> {
    // Registers: the result, the context, and the values from the context.
    const VERDICT: u8 = 0;
    const CONTEXT: u8 = 1;
    const KIND: u8 = 2;
    const ACCESS: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    let mut program = vec![
        Instruction::load32(KIND, CONTEXT, 0),
        Instruction::copy32(ACCESS, KIND),
        Instruction::and32(KIND, 0xffff),
        Instruction::shift_right32(ACCESS, 16),
        Instruction::load32(MAJOR, CONTEXT, 4),
        Instruction::load32(MINOR, CONTEXT, 8),
    ];
    for rule in rules.rev() {
        let numbers = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let checks: Vec<(u8, i32)> = numbers
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        // The number of the rule's instructions that follow a check. A failed check skips them.
        let mut rest = i16::try_from(checks.len()).unwrap_or(0) + 3 + 2;
        for (register, value) in checks {
            rest -= 1;
            program.push(Instruction::jump_if_not_equal32(register, value, rest));
        }
        // The context is not needed any more. Its register gets the requested accesses that the rule does not cover.
        program.extend([
            Instruction::copy32(CONTEXT, ACCESS),
            Instruction::and32(CONTEXT, !rule.access & (MKNOD | READ | WRITE)),
            Instruction::jump_if_not_equal32(CONTEXT, 0, 2),
            Instruction::set32(VERDICT, i32::from(rule.allow)),
            Instruction::exit(),
        ]);
    }
    program.extend([Instruction::set32(VERDICT, 0), Instruction::exit()]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: serde_json::Value) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        rules.iter().filter_map(parse).collect()
    }

    /// Interprets a compiled program as the kernel would. Supports only the instructions that `compile` emits.
    fn verdict(rules: &[Rule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let program = compile(rules.iter().chain(&ALWAYS_ALLOWED));
        let context = [kind | (access << 16), major, minor];
        let mut registers = [0_i32; 6];
        let mut at = 0_usize;
        loop {
            let Instruction {
                code,
                registers: pair,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                0x61 => registers[to] = context[usize::try_from(offset).unwrap() / 4],
                0xbc => registers[to] = registers[from],
                0x54 => registers[to] &= immediate,
                0x74 => registers[to] >>= immediate,
                0xb4 => registers[to] = immediate,
                0x56 if registers[to] != immediate => at += usize::try_from(offset).unwrap(),
                0x56 => {}
                0x95 => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn default_rules_deny_disks_and_allow_standard_devices_cve_2020_2023() {
        let rules = rules(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
        ]));
        for (kind, access, major, minor, expected) in [
            (BLOCK, READ, 254, 0, false),
            (BLOCK, MKNOD, 254, 0, true),
            (BLOCK, READ, 8, 3, true),
            (BLOCK, READ | WRITE, 8, 3, false),
            (CHARACTER, READ | WRITE, 1, 3, true),
            (CHARACTER, READ, 136, 77, true),
            (CHARACTER, READ | WRITE, 10, 200, true),
            (CHARACTER, READ | WRITE, 10, 229, true),
            (CHARACTER, READ, 10, 201, false),
            (BLOCK, READ, 10, 200, false),
        ] {
            let found = verdict(&rules, kind, access, major, minor);
            assert_eq!(found, expected, "kind {kind} access {access} of {major}:{minor}");
        }
    }

    #[test]
    fn access_is_unrestricted_only_after_a_rule_that_allows_everything() {
        for (json, expected) in [
            (serde_json::json!([]), false),
            (serde_json::json!([{"allow": false, "access": "rwm"}]), false),
            (
                serde_json::json!([{"allow": false}, {"allow": true, "type": "a", "access": "rwm"}]),
                true,
            ),
            (
                serde_json::json!([{"allow": true}, {"allow": false, "type": "b", "major": 254}]),
                false,
            ),
            (serde_json::json!([{"allow": true, "access": "r"}]), false),
        ] {
            assert_eq!(is_unconfined(&rules(json.clone())), expected, "{json}");
        }
    }
}
