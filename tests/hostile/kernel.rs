//! A guest's kernel that attacks its machine: it writes random values to every register, ring and doorbell that it
//! finds, on both boards, and never stops. It starts as a Linux kernel does, by the 64-bit boot protocol, and runs on
//! one vCPU without interrupts. The argument "mmio" of its command line says that the machine is the container board.
//!
//! Once in 4096 steps it writes "hostile: STEPS" to the serial port. Its random numbers start from the time stamp
//! counter, so that each boot is another attack.

#![no_std]
#![no_main]

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
    ptr::{read_volatile, write_volatile},
};

global_asm!(
    // CR4: OSFXSR and OSXMMEXCPT, for the SSE instructions that the compiler uses.
    ".globl start",
    "start: cli",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "lea rsp, [rip + STACK + {stack_size}]",
    "mov rdi, rsi",
    "call {main}",
    // Any exception, and an NMI that a device's interrupt raises: continue with the next step.
    ".globl resume",
    "resume: lea rsp, [rip + STACK + {stack_size}]",
    "call {attack}",
    stack_size = const STACK_SIZE,
    main = sym main,
    attack = sym attack,
);

unsafe extern "C" {
    fn resume() -> !;
}

const STACK_SIZE: usize = 64 << 10;

#[repr(align(4096))]
struct Pages<const N: usize>([u64; N]);

#[unsafe(no_mangle)]
static mut STACK: Pages<{ STACK_SIZE / 8 }> = Pages([0; STACK_SIZE / 8]);
/// Page tables that map the first 4 GiB to themselves: one page of the top level, one of pointers, four of directories.
static mut TOP: Pages<512> = Pages([0; 512]);
static mut POINTERS: Pages<512> = Pages([0; 512]);
static mut DIRECTORIES: Pages<2048> = Pages([0; 2048]);
static mut INTERRUPTS: Pages<512> = Pages([0; 512]);
static mut STATE: State = State {
    random: 1,
    steps: 0,
    targets: 0,
    board: Board::Container,
};

#[derive(Clone, Copy, PartialEq)]
enum Board {
    Container,
    Pc,
}

struct State {
    random: u64,
    steps: u64,
    /// A bit for each device that this boot attacks. Others are left alone: when a device fails that the machine needs,
    /// the machine ends, and the attack with it.
    targets: u64,
    board: Board,
}

/// Memory for rings and buffers. The program itself is below it.
const ARENA: u64 = 16 << 20;
const ARENA_SIZE: u64 = 4 << 20;

const DEVICE_WINDOW: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000;
/// The size of the registers of a device on the container board.
const MMIO_WINDOW: u64 = 0x1000;
/// The size of the registers of a device on the PC board.
const BAR_WINDOW: u64 = 0x1_0000;
const DEVICES: u64 = 32;
const COM1: u16 = 0x3f8;

extern "C" fn main(zero_page: *const u8) -> ! {
    // SAFETY: this program has one thread, and nothing else uses its statics.
    unsafe {
        map_memory();
        catch_exceptions();
        let command_line = read_volatile(zero_page.add(0x228).cast::<u32>()) as *const u8;
        STATE.board = if contains(command_line, b"mmio") {
            Board::Container
        } else {
            Board::Pc
        };
        STATE.random = core::arch::x86_64::_rdtsc() | 1;
        STATE.targets = random() | 1 << below(DEVICES);
    }
    attack()
}

/// # Safety
///
/// Call it once.
unsafe fn map_memory() {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE_PAGE: u64 = 1 << 7;
    // SAFETY: nothing else uses the tables, and they map the memory that this program is in to itself.
    unsafe {
        let directories = (&raw mut DIRECTORIES).cast::<u64>();
        for index in 0..2048 {
            write_volatile(
                directories.add(index),
                ((index as u64) << 21) | PRESENT_WRITABLE | HUGE_PAGE,
            );
        }
        let pointers = (&raw mut POINTERS).cast::<u64>();
        for index in 0..4 {
            write_volatile(
                pointers.add(index),
                directories as u64 + index as u64 * 4096 | PRESENT_WRITABLE,
            );
        }
        let top = (&raw mut TOP).cast::<u64>();
        write_volatile(top, pointers as u64 | PRESENT_WRITABLE);
        asm!("mov cr3, {}", in(reg) top);
    }
}

/// # Safety
///
/// Call it once.
unsafe fn catch_exceptions() {
    // SAFETY: nothing else uses the table, and the handler never returns to the code that it interrupts.
    unsafe {
        let table = (&raw mut INTERRUPTS).cast::<u64>();
        let handler = resume as *const () as u64;
        let code_segment: u16;
        asm!("mov {0:x}, cs", out(reg) code_segment);
        // An interrupt gate (Intel SDM, volume 3, section 7.14.1).
        let gate = (handler & 0xffff) | u64::from(code_segment) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        for vector in 0..256 {
            write_volatile(table.add(vector * 2), gate);
            write_volatile(table.add(vector * 2 + 1), handler >> 32);
        }
        let mut pointer = [0_u8; 10];
        pointer[..2].copy_from_slice(&4095_u16.to_le_bytes());
        pointer[2..].copy_from_slice(&(table as u64).to_le_bytes());
        asm!("lidt [{}]", in(reg) pointer.as_ptr());
    }
}

/// # Safety
///
/// `text` ends with a zero.
unsafe fn contains(mut text: *const u8, word: &[u8]) -> bool {
    // SAFETY: no byte after the zero is read, since it differs from the bytes of the word.
    unsafe {
        while *text != 0 {
            if word.iter().enumerate().all(|(index, byte)| *text.add(index) == *byte) {
                return true;
            }
            text = text.add(1);
        }
    }
    false
}

extern "C" fn attack() -> ! {
    loop {
        step();
    }
}

/// The next random number (xorshift64).
fn random() -> u64 {
    // SAFETY: one thread.
    unsafe {
        let mut value = STATE.random;
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        STATE.random = value;
        value >> 3
    }
}

fn below(limit: u64) -> u64 {
    random() % limit
}

fn step() {
    // SAFETY: one thread.
    let (steps, board) = unsafe {
        STATE.steps += 1;
        (STATE.steps, STATE.board)
    };
    if steps % 4096 == 1 {
        report(steps);
    }
    let device = target();
    match below(64) {
        0..2 => activate(board, device),
        2..24 => fill_ring(),
        24..44 => notify(board, device),
        44..58 => touch(register_of(board, device)),
        58..60 => port(),
        60..62 if board == Board::Pc => configure(device),
        _ => touch(DEVICE_WINDOW + below(0x4000_0000 - 0x140_0000)),
    }
}

/// A device that this boot attacks.
fn target() -> u64 {
    loop {
        let device = below(DEVICES);
        // SAFETY: one thread.
        if unsafe { STATE.targets } >> device & 1 == 1 {
            return device;
        }
    }
}

/// The base of a device's registers.
fn base(board: Board, device: u64) -> u64 {
    match board {
        Board::Container => DEVICE_WINDOW + device * MMIO_WINDOW,
        Board::Pc => {
            let bar = read(ECAM + device * 0x8000 + 0x10, 4) & !0xf;
            if (DEVICE_WINDOW..ECAM).contains(&bar) {
                bar
            } else {
                DEVICE_WINDOW + device * BAR_WINDOW
            }
        }
    }
}

/// Any register of a device, those of its transport most often.
fn register_of(board: Board, device: u64) -> u64 {
    let window = match board {
        Board::Container => MMIO_WINDOW,
        Board::Pc => BAR_WINDOW,
    };
    let offset = match below(4) {
        0 => below(window),
        // Configuration space, and messages of interrupts.
        1 if board == Board::Pc => [0x1000, 0x2000, 0x3000, 0x6000, 0xe000][below(5) as usize] + below(64),
        _ => below(0x120),
    };
    let alignment = [1, 2, 4, 4, 4, 8][below(6) as usize];
    base(board, device) + offset / alignment * alignment
}

/// Values at which code decides: small ones, powers of two and their neighbours, and addresses.
fn value() -> u64 {
    match below(8) {
        0 => 0,
        1 => below(16),
        2 => (1 << below(64)) - below(2),
        3 => address(),
        4 => u64::MAX - below(4096),
        5 => below(0x1_0000),
        _ => random(),
    }
}

/// An address of a buffer: mostly in the arena, sometimes at its end or anywhere.
fn address() -> u64 {
    match below(16) {
        0 => random(),
        1 => (256 << 20) - below(4096),
        2 => DEVICE_WINDOW + below(0x1_0000),
        _ => ARENA + below(ARENA_SIZE),
    }
}

/// Where a device may be told that its queue is: the parts overlap often, because there are few places.
fn ring() -> u64 {
    if below(32) == 0 {
        address()
    } else {
        ARENA + below(16) * 0x1000
    }
}

fn touch(address: u64) {
    let size = [1, 2, 4, 4, 4, 8][below(6) as usize];
    if below(4) == 0 {
        read(address, size);
    } else {
        write(address, size, value());
    }
}

/// Negotiates with a device as a driver does, with one wrong step from time to time.
fn activate(board: Board, device: u64) {
    let base = base(board, device);
    let is_wrong = |share: u64| below(share) == 0;
    let status = |value: u64| match board {
        Board::Container => write(base + 0x70, 4, value),
        Board::Pc => write(base + 20, 1, value),
    };
    let features = || if is_wrong(4) { random() } else { u64::MAX >> below(40) };
    if board == Board::Pc {
        // Memory and bus mastering.
        write(ECAM + device * 0x8000 + 4, 2, 6);
    }
    status(0);
    status(1);
    status(3);
    for half in 0..2 {
        let (select_offered, offered, select, accept) = match board {
            Board::Container => (0x14, 0x10, 0x24, 0x20),
            Board::Pc => (0, 4, 8, 12),
        };
        write(base + select_offered, 4, half);
        let offered = read(base + offered, 4);
        write(base + select, 4, half);
        write(
            base + accept,
            4,
            if is_wrong(8) {
                features()
            } else {
                offered & features() | half
            },
        );
    }
    status(11);
    for queue in 0..below(6) {
        let size = if is_wrong(8) { value() } else { 1 << below(9) };
        match board {
            Board::Container => {
                write(base + 0x30, 4, queue);
                write(base + 0x38, 4, size);
                for low in [0x80, 0x90, 0xa0] {
                    let address = ring();
                    write(base + low, 4, address);
                    write(base + low + 4, 4, address >> 32);
                }
                write(base + 0x44, 4, 1);
            }
            Board::Pc => {
                write(base + 22, 2, queue);
                write(base + 24, 2, size);
                for area in [32, 40, 48] {
                    let address = ring();
                    write(base + area, 4, address);
                    write(base + area + 4, 4, address >> 32);
                }
                write(base + 28, 2, 1);
            }
        }
    }
    status(15);
}

/// Writes something like descriptors and indexes where the queues are.
fn fill_ring() {
    let page = ARENA + below(16) * 0x1000;
    match below(4) {
        // A descriptor.
        0..3 => {
            let descriptor = page + below(64) * 16;
            write(descriptor, 8, address());
            let length = if below(4) == 0 { value() } else { 1 << below(16) };
            let flags = if below(8) == 0 { random() & 7 } else { below(4) };
            write(descriptor + 8, 8, length & 0xffff_ffff | flags << 32 | below(64) << 48);
            // The start of a request: a small type or an operation.
            write(ARENA + below(ARENA_SIZE / 8) * 8, 8, value());
        }
        // The available ring: an entry, and the index moves on.
        _ => {
            write(page + 4 + below(64) * 2, 2, below(64));
            let index = read(page + 2, 2);
            write(page + 2, 2, if below(16) == 0 { random() } else { index + 1 });
        }
    }
}

fn notify(board: Board, device: u64) {
    let queue = below(6);
    match board {
        Board::Container => write(base(board, device) + 0x50, 4, queue),
        Board::Pc => write(base(board, device) + 0x3000 + queue * 4, 2, queue),
    }
}

/// A random access to an I/O port. Those that end the machine or swallow the reports are left out.
fn port() {
    let port = match below(4) {
        0 => 0xcf8 + below(8),
        1 => 0x600 + below(32),
        _ => below(0x1_0000),
    } as u16;
    if matches!(port, 0x60..=0x64 | 0x600 | COM1..0x400) {
        return;
    }
    // SAFETY: only the machine is affected.
    unsafe {
        if below(4) == 0 {
            asm!("in eax, dx", in("dx") port, out("eax") _);
        } else {
            asm!("out dx, eax", in("dx") port, in("eax") value() as u32);
        }
    }
}

/// A random write to the configuration space of a PCI device, also to its BARs.
fn configure(device: u64) {
    let offset = match below(4) {
        0 => below(4096),
        1 => 0x10 + below(6) * 4,
        _ => below(0x100),
    };
    let size = [1, 2, 4][below(3) as usize];
    write(ECAM + device * 0x8000 + offset / size * size, size, value());
}

fn write(address: u64, size: u64, value: u64) {
    // SAFETY: only the machine is affected. The address is mapped or raises an exception, which is caught.
    unsafe {
        match size {
            1 => asm!("mov [{}], {:l}", in(reg) address, in(reg_abcd) value),
            2 => asm!("mov [{}], {:x}", in(reg) address, in(reg) value),
            4 => asm!("mov [{}], {:e}", in(reg) address, in(reg) value),
            _ => asm!("mov [{}], {}", in(reg) address, in(reg) value),
        }
    }
}

fn read(address: u64, size: u64) -> u64 {
    let mut value = 0_u64;
    // SAFETY: as in `write`.
    unsafe {
        match size {
            1 => asm!("mov {:l}, [{}]", inout(reg_abcd) value, in(reg) address),
            2 => asm!("mov {:x}, [{}]", inout(reg) value, in(reg) address),
            4 => asm!("mov {:e}, [{}]", inout(reg) value, in(reg) address),
            _ => asm!("mov {}, [{}]", inout(reg) value, in(reg) address),
        }
    }
    value
}

/// Writes "hostile: STEPS" to the serial port.
fn report(steps: u64) {
    let mut digits = [b'0'; 20];
    let mut rest = steps;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    for byte in b"hostile: ".iter().chain(&digits).chain(b"\n") {
        // SAFETY: the data register of the serial port.
        unsafe { asm!("out dx, al", in("dx") COM1, in("al") *byte) };
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    attack()
}

/// The unwinding functions of `core`, which are linked but never run, refer to it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
