//! Standard streams: fifos, logging programs, and streams that clients open at the shim's socket.

use std::io::{ErrorKind, Read, Write};

use containerd_shim::protos::{
    api::{CloseIORequest, Empty},
    protobuf::well_known_types::wrappers::{BytesValue, Int32Value, StringValue},
    ttrpc::{Request as RawRequest, asynchronous::ClientStream},
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::shim::{stdio::STREAMING_SERVICE, tests::script::write_script};

const STREAM_INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

impl Shim {
    async fn close_stdin(&self, id: &str) {
        let request = CloseIORequest {
            id: id.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.task.close_io(context::Context::default(), &request).await.unwrap();
    }

    /// Opens a stream as CRI does: on a connection of its own.
    async fn open(&self, id: &str) -> ClientStream<Any, Any> {
        let client = connect(&self.folder.path().join("socket")).await;
        let request = RawRequest {
            service: STREAMING_SERVICE.to_owned(),
            method: "Stream".to_owned(),
            ..RawRequest::default()
        };
        let mut stream = ClientStream::<Any, Any>::new(client.new_stream(request, true, true).await.unwrap());
        let init = StringValue {
            value: id.to_owned(),
            ..StringValue::default()
        };
        stream.send(&any(STREAM_INIT, &init)).await.unwrap();
        let answer = stream.recv().await.unwrap();
        assert_eq!(answer.type_url, "google.protobuf.Empty");
        stream
    }

    /// The request to create `id` with streams that clients open.
    fn streaming_request(&self, id: &str) -> CreateTaskRequest {
        let socket = self.folder.path().join("socket");
        let uri = |stream| format!("ttrpc+unix://{}?streaming_id={id}-{stream}", socket.display());
        CreateTaskRequest {
            stdin: uri("stdin"),
            stdout: uri("stdout"),
            stderr: String::new(),
            ..self.request(id)
        }
    }

    /// Runs `c1` with such streams.
    async fn run_streaming(&self) -> (ClientStream<Any, Any>, ClientStream<Any, Any>) {
        let streams = (self.open("c1-stdin").await, self.open("c1-stdout").await);
        self.create_as(&self.streaming_request("c1")).await.unwrap();
        self.start_task("c1", "").await.unwrap();
        streams
    }

    async fn create_as(&self, request: &CreateTaskRequest) -> ttrpc::Result<u32> {
        let created = self.task.create(context::Context::default(), request).await?;
        Ok(created.pid)
    }
}

fn any(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: message.write_to_bytes().unwrap(),
        ..Any::default()
    }
}

fn data(bytes: &[u8]) -> Any {
    let message = BytesValue {
        value: bytes.to_vec(),
        ..BytesValue::default()
    };
    any(DATA, &message)
}

/// All bytes up to the end that the shim makes.
async fn receive_all(mut stream: ClientStream<Any, Any>) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        match stream.recv().await {
            Ok(message) => {
                assert_eq!(message.type_url, DATA);
                bytes.extend(BytesValue::parse_from_bytes(&message.value).unwrap().value);
            }
            Err(ttrpc::Error::Eof) => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Takes the window that the shim grants.
async fn window(stream: &mut ClientStream<Any, Any>) -> i32 {
    let update = stream.recv().await.unwrap();
    assert_eq!(update.type_url, WINDOW_UPDATE);
    Int32Value::parse_from_bytes(&update.value).unwrap().value
}

/// Reads what is written next into a pipe, without keeping the shim, which runs on this thread, from it.
async fn read_some(input: &File) -> Vec<u8> {
    let input = input.try_clone().unwrap();
    tokio::task::spawn_blocking(move || read_next(&input)).await.unwrap()
}

#[tokio::test]
async fn reader_has_all_output_and_its_end_before_delete_returns() {
    let shim = Shim::start().await;
    let request = shim.request("c1");
    let reader = reader(&shim, "c1");
    shim.create_as(&request).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    shim.fake.write_and_close("c1", "last words");
    shim.fake.exit("c1", None, 0, [10, 0]);
    shim.wait("c1", "").await.unwrap();

    shim.delete("c1", "").await.unwrap();

    assert_eq!(read_next(&reader), b"last words");
    assert_eq!(read_next(&reader), b"");
}

#[tokio::test]
async fn own_reader_keeps_output_writable_when_containerd_is_away() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    // Nobody has ever opened the other end.
    shim.fake.write_and_close("c1", "unheard");
    shim.fake.exit("c1", None, 0, [7, 0]);
    assert_eq!(shim.wait("c1", "").await.unwrap(), 0);
    let late = reader(&shim, "c1");
    assert_eq!(read_next(&late), b"unheard");
    assert_eq!(read_next(&late), b"");
}

#[tokio::test]
async fn input_ends_with_close_io_and_not_with_a_client() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let mut input = shim.fake.take_input("c1");
    let fifo = shim.folder.path().join("c1/in");
    for text in ["first", "again"] {
        let mut client = File::options().write(true).open(&fifo).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        drop(client);
        let mut bytes = [0; 16];
        assert_eq!(input.read(&mut bytes).unwrap(), 5);
        assert_eq!(input.read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    shim.close_stdin("c1").await;
    shim.close_stdin("c1").await;

    assert_eq!(read_next(&input), b"");
}

#[tokio::test]
async fn input_that_was_closed_before_the_start_of_an_exec_has_ended() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let request = ExecProcessRequest {
        id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        stdin: shim.folder.path().join("c1/in").display().to_string(),
        spec: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: br#"{"args":["cat"],"cwd":"/"}"#.to_vec(),
            ..Any::default()
        })
        .into(),
        ..ExecProcessRequest::default()
    };
    shim.task.exec(context::Context::default(), &request).await.unwrap();
    let close = CloseIORequest {
        id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        stdin: true,
        ..CloseIORequest::default()
    };
    let closed: ttrpc::Result<Empty> = shim.task.close_io(context::Context::default(), &close).await;
    closed.unwrap();
    // The container's own input is the same fifo.
    shim.close_stdin("c1").await;

    shim.start_task("c1", "e1").await.unwrap();

    let input = shim.fake.take_exec_input("c1", "e1");
    assert_eq!(read_next(&input), b"");
}

#[tokio::test]
async fn logging_program_has_all_output_and_has_ended_when_delete_returns() {
    let shim = Shim::start().await;
    let log = shim.folder.path().join("log");
    let program = shim.folder.path().join("logger");
    let script = format!(
        "exec >{}; exec 5>&-\necho $CONTAINER_ID: $1 $2 $(/bin/cat <&3); /bin/cat <&4; echo end",
        log.display()
    );
    write_script(&program, &script);
    let request = CreateTaskRequest {
        stdout: format!("binary://{}?key=a+b", program.display()),
        stderr: String::new(),
        ..shim.request("c1")
    };
    shim.create_as(&request).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    shim.fake.write_and_close("c1", "last words");
    shim.fake.exit("c1", None, 0, [10, 0]);
    shim.wait("c1", "").await.unwrap();

    shim.delete("c1", "").await.unwrap();

    assert_eq!(fs::read_to_string(log).unwrap(), "c1: key a b last words\nend\n");
}

#[tokio::test]
async fn logging_program_that_cannot_start_is_the_error_of_create() {
    let mut shim = Shim::start().await;
    let request = CreateTaskRequest {
        stdout: "binary:///no/such/logger".to_owned(),
        stderr: "binary:///no/such/logger".to_owned(),
        ..shim.request("c1")
    };
    let (_, text) = refusal(shim.create_as(&request).await);
    assert!(
        text.contains("start the logging program /no/such/logger: No such file or directory"),
        "{text}"
    );
    shim.no_more_events().await;
}

#[tokio::test]
async fn streamed_output_reaches_its_client_before_the_exit_is_reported() {
    let shim = Shim::start().await;
    let (_stdin, stdout) = shim.run_streaming().await;
    let client = tokio::spawn(receive_all(stdout));
    let block: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    let mut output = shim.fake.take_output("c1");
    let pipe = output.try_clone().unwrap();
    let written = block.clone();
    let writer = tokio::task::spawn_blocking(move || output.write_all(&written).unwrap());
    shim.fake.exit("c1", None, 0, [1 << 20, 0]);

    shim.wait("c1", "").await.unwrap();

    let left = rustix::io::ioctl_fionread(pipe).unwrap();
    assert_eq!(left, 0, "reported before it was taken");
    writer.await.unwrap();
    shim.fake.closed_output("c1");
    shim.delete("c1", "").await.unwrap();
    let received = client.await.unwrap();
    assert!(received == block, "{} of {} bytes", received.len(), block.len());
}

#[tokio::test]
async fn client_that_reads_nothing_holds_the_writer_up() {
    let shim = Shim::start().await;
    let _stdin = shim.open("c1-stdin").await;
    let mut stdout = UnixStream::connect(shim.folder.path().join("socket")).await.unwrap();
    let request = RawRequest {
        service: STREAMING_SERVICE.to_owned(),
        method: "Stream".to_owned(),
        ..RawRequest::default()
    };
    let init = StringValue {
        value: "c1-stdout".to_owned(),
        ..StringValue::default()
    };
    // ttrpc frames: length, stream id, type (1 request, 3 data), flags (2 open, 4 no data).
    for (kind, flags, payload) in [
        (1, 6, request.write_to_bytes().unwrap()),
        (3, 0, any(STREAM_INIT, &init).write_to_bytes().unwrap()),
    ] {
        let length = u32::try_from(payload.len()).unwrap();
        let header = [length.to_be_bytes(), 1_u32.to_be_bytes()].concat();
        stdout
            .write_all(&[header, vec![kind, flags], payload].concat())
            .await
            .unwrap();
    }
    shim.create_as(&shim.streaming_request("c1")).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    let mut output = shim.fake.take_output("c1");
    fcntl_setfl(&output, fcntl_getfl(&output).unwrap() | OFlags::NONBLOCK).unwrap();

    let (mut taken, mut refused) = (0, 0);
    while refused < 1000 {
        match output.write(&[b'x'; 4096]) {
            Ok(count) => (taken, refused) = (taken + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refused += 1;
                tokio::task::yield_now().await;
            }
        }
        assert!(taken < 2 << 20, "nobody reads, and {taken} bytes were taken");
    }
}

#[tokio::test]
async fn client_that_comes_back_gets_the_rest() {
    let shim = Shim::start().await;
    let (_stdin, mut stdout) = shim.run_streaming().await;
    let mut output = shim.fake.take_output("c1");
    output.write_all(b"before").unwrap();
    assert_eq!(stdout.recv().await.unwrap(), data(b"before"));

    stdout.close_send().await.unwrap();
    assert!(matches!(stdout.recv().await, Err(ttrpc::Error::Eof)));
    output.write_all(b"meanwhile").unwrap();
    let stdout = shim.open("c1-stdout").await;
    drop(output);

    assert_eq!(receive_all(stdout).await, b"meanwhile");
}

#[tokio::test]
async fn streamed_input_ends_with_close_io_and_not_with_a_client() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let input = shim.fake.take_input("c1");
    assert_eq!(window(&mut stdin).await, 64 << 10);
    stdin.send(&data(b"first")).await.unwrap();
    assert_eq!(read_some(&input).await, b"first");

    stdin.close_send().await.unwrap();
    assert!(matches!(stdin.recv().await, Err(ttrpc::Error::Eof)));
    let mut stdin = shim.open("c1-stdin").await;
    window(&mut stdin).await;
    stdin.send(&data(b"again")).await.unwrap();
    assert_eq!(read_some(&input).await, b"again");

    // CloseIO goes another way than the data, and may overtake it.
    shim.close_stdin("c1").await;
    stdin.send(&data(b"late")).await.unwrap();
    stdin.close_send().await.unwrap();
    assert_eq!(read_some(&input).await, b"late");
    assert_eq!(read_some(&input).await, b"");
}

#[tokio::test]
async fn streamed_input_of_many_windows_arrives() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let mut input = shim.fake.take_input("c1");
    let reader = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let block: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    let mut granted = 0;
    for piece in block.chunks(30_000) {
        let length = i32::try_from(piece.len()).unwrap();
        while granted < length {
            granted += window(&mut stdin).await;
        }
        stdin.send(&data(piece)).await.unwrap();
        granted -= length;
    }
    shim.close_stdin("c1").await;
    stdin.close_send().await.unwrap();
    assert!(reader.await.unwrap() == block);
}

#[tokio::test]
async fn streamed_input_ends_with_close_io_though_its_client_stays() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let input = shim.fake.take_input("c1");
    window(&mut stdin).await;
    shim.close_stdin("c1").await;
    assert_eq!(read_some(&input).await, b"");
}

#[tokio::test]
async fn client_hears_of_the_end_of_a_task_that_is_killed_and_deleted() {
    let shim = Shim::start().await;
    let (mut stdin, stdout) = shim.run_streaming().await;
    window(&mut stdin).await;
    shim.kill("c1", "", 9).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    assert_eq!(receive_all(stdout).await, b"");
    assert!(matches!(stdin.recv().await, Err(ttrpc::Error::Eof)));
}
