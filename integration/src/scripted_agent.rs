//! A guest agent of a guest without an operating system: it freezes nothing, says what a test wants it to, and
//! runs what it is asked to run on the host, or pretends to.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

/// What came of a command: what it returned, or an error's text; `None` for silence.
pub type Answer = Option<Result<Value, String>>;

/// An agent on a socket. Its threads end with the test's process.
#[derive(Debug)]
pub struct ScriptedAgent {
    socket: PathBuf,
}

impl ScriptedAgent {
    /// Starts one that answers to each command, but for the synchronisation, with what `answer` returns: what a
    /// command returned, an error's text, or `None` for silence.
    pub fn start(
        socket: &Path,
        answer: impl Fn(&str, &Value) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = UnixListener::bind(socket).expect("a new socket");
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answer = Arc::clone(&answer);
                thread::spawn(move || converse(stream, &*answer));
            }
        });
        Self { socket: socket.to_owned() }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

fn converse(mut stream: UnixStream, answer: &dyn Fn(&str, &Value) -> Answer) {
    let reader = BufReader::new(stream.try_clone().expect("descriptors are free"));
    for line in reader.split(b'\n').map_while(Result::ok) {
        let start = line.iter().position(|byte| *byte == b'{').unwrap_or(line.len());
        let Ok(request) = serde_json::from_slice::<Value>(&line[start..]) else { continue };
        let (command, arguments) =
            (request["execute"].as_str().unwrap_or_default(), &request["arguments"]);
        let mut reply = Vec::new();
        if command == "guest-sync-delimited" {
            reply.push(0xff);
            reply.extend(json!({"return": arguments["id"]}).to_string().into_bytes());
        } else {
            let text = match answer(command, arguments) {
                Some(Ok(value)) => json!({"return": value}),
                Some(Err(why)) => json!({"error": {"class": "GenericError", "desc": why}}),
                None => continue,
            };
            reply.extend(text.to_string().into_bytes());
        }
        reply.push(b'\n');
        if stream.write_all(&reply).is_err() {
            return;
        }
    }
}
