//! Traffic to measure a network by, both ends.
//!
//! ```text
//! traffic serve ADDRESS
//! traffic echo ADDRESS COUNT       a byte there and back, COUNT times
//! traffic send ADDRESS BYTES       a stream to the server
//! traffic receive ADDRESS BYTES    a stream from it
//! ```
//!
//! A client prints how many microseconds it took, from the connection on.

use std::{
    env,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    thread,
    time::Instant,
};

const CHUNK: usize = 64 << 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", address] => serve(address),
        [what, address, count] => match (count.parse(), what) {
            (Ok(count), "echo" | "send" | "receive") => client(what, address, count),
            _ => return ExitCode::from(2),
        },
        _ => return ExitCode::from(2),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a client wants is its first byte, how much of it the next eight.
fn serve(address: &str) -> io::Result<()> {
    for connection in TcpListener::bind(address)?.incoming() {
        let connection = connection?;
        thread::spawn(move || answer(connection));
    }
    Ok(())
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let (mut what, mut count) = ([0], [0; 8]);
    connection.read_exact(&mut what)?;
    connection.read_exact(&mut count)?;
    let count = u64::from_le_bytes(count);
    match what[0] {
        b'e' => {
            let mut byte = [0];
            for _ in 0..count {
                connection.read_exact(&mut byte)?;
                connection.write_all(&byte)?;
            }
            Ok(())
        }
        b's' => {
            take(&mut connection, count)?;
            connection.write_all(b".")
        }
        _ => give(&mut connection, count),
    }
}

fn client(what: &str, address: &str, count: u64) -> io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    connection.write_all(&what.as_bytes()[..1])?;
    connection.write_all(&count.to_le_bytes())?;
    let mut byte = [7];
    let from = Instant::now();
    let done = match what {
        "echo" => {
            for _ in 0..count {
                connection.write_all(&byte)?;
                connection.read_exact(&mut byte)?;
            }
            Ok(())
        }
        "send" => {
            give(&mut connection, count)?;
            connection.read_exact(&mut byte)
        }
        _ => take(&mut connection, count),
    };
    println!("{}", from.elapsed().as_micros());
    done
}

fn give(connection: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    while left > 0 {
        let part = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        connection.write_all(&chunk[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn take(connection: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let part = connection.read(&mut chunk)?;
        if part == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left = left.saturating_sub(part as u64);
    }
    Ok(())
}
