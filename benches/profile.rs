//! Evaluates the samples of the lab's profiler (tests/lab/emulator.patches/samples.patch).
//!
//!     profile SAMPLES PERIOD HOST_SYMBOLS GUEST_SYMBOLS STEP NAME
//!
//! Prints three tables for the step: millions of instructions by task, and the functions of the host's and of the
//! guest's kernel that take most of them. HOST_SYMBOLS has the format of /proc/kallsyms, and GUEST_SYMBOLS that of
//! System.map. PERIOD is the number of instructions between two samples. STEP is the number of the step in SAMPLES, and
//! NAME its title in the output.
//!
//! A line of SAMPLES has the number of the step, the level of virtualization (1: the lab machine, which is the host
//! here; 2: a guest in it), the privilege level (0: kernel), the address of the instruction in hexadecimal, and the
//! task.

use std::{collections::HashMap, env, fs, process::ExitCode};

/// How many rows a table has at most.
const MAX_ROWS: usize = 20;

/// The functions of a kernel, by address.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    fn read(path: &str) -> Result<Self, String> {
        let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
        let mut symbols: Vec<_> = text
            .lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace();
                let address = u64::from_str_radix(fields.next()?, 16).ok()?;
                let is_code = matches!(fields.next()?, "t" | "T" | "w" | "W");
                is_code.then_some((address, fields.next()?.to_owned()))
            })
            .collect();
        symbols.sort();
        match symbols.is_empty() {
            true => Err(format!("{path} has no symbols")),
            false => Ok(Self(symbols)),
        }
    }

    fn name(&self, address: u64) -> &str {
        match self.0.partition_point(|(start, _)| *start <= address) {
            0 => "(before the first function)",
            after => &self.0[after - 1].1,
        }
    }
}

/// Prints the rows with the highest counts, as millions of instructions and as a share of `total` samples.
fn print_table(title: &str, counts: &HashMap<String, u64>, total: u64, period: f64) {
    let mut rows: Vec<_> = counts.iter().collect();
    rows.sort_by_key(|(name, count)| (u64::MAX - **count, (*name).clone()));
    println!("\n| {title} | million instructions | share |\n|---|---|---|");
    let print = |name: &str, count: u64| {
        let share = 100.0 * count as f64 / total as f64;
        println!("| {name} | {:.1} | {share:.1} % |", count as f64 * period / 1e6);
    };
    for (name, count) in rows.iter().take(MAX_ROWS) {
        print(name, **count);
    }
    let rest: u64 = rows.iter().skip(MAX_ROWS).map(|(_, count)| **count).sum();
    if rest > 0 {
        print(&format!("{} others", rows.len() - MAX_ROWS), rest);
    }
}

fn run(arguments: &[String]) -> Result<(), String> {
    let [samples, period, host, guest, step, name] = arguments else {
        return Err("usage: profile SAMPLES PERIOD HOST_SYMBOLS GUEST_SYMBOLS STEP NAME".to_owned());
    };
    let period: f64 = period.parse().map_err(|error| format!("PERIOD: {error}"))?;
    let (host, guest) = (Symbols::read(host)?, Symbols::read(guest)?);
    let text = fs::read(samples).map_err(|error| format!("cannot read {samples}: {error}"))?;
    let text = String::from_utf8_lossy(&text);

    let (mut tasks, mut host_functions, mut guest_functions) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut total = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<_> = line.split(' ').collect();
        let [line_step, level, privilege, address, task] = fields[..] else {
            return Err(format!("{samples} has a line that is not a sample: {line:?}"));
        };
        if line_step != step {
            continue;
        }
        let address = u64::from_str_radix(address, 16)
            .map_err(|error| format!("{samples}: the address in {line:?} is not a hexadecimal number: {error}"))?;
        total += 1;
        let (place, functions) = match (level, privilege) {
            ("1", "0") => (format!("{task}: host kernel"), Some((&host, &mut host_functions))),
            ("1", _) => (format!("{task}: program"), None),
            (_, "0") => ("guest kernel".to_owned(), Some((&guest, &mut guest_functions))),
            _ => ("guest programs".to_owned(), None),
        };
        *tasks.entry(place).or_default() += 1;
        if let Some((symbols, counts)) = functions {
            *counts.entry(symbols.name(address).to_owned()).or_default() += 1;
        }
    }
    if total == 0 {
        return Err(format!("{samples} has no samples of step {step}"));
    }
    println!("\n### {name}: {:.0} million instructions", total as f64 * period / 1e6);
    print_table("task", &tasks, total, period);
    print_table("function of the host's kernel", &host_functions, total, period);
    if !guest_functions.is_empty() {
        print_table("function of the guest's kernel", &guest_functions, total, period);
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("profile: {error}");
            ExitCode::FAILURE
        }
    }
}
