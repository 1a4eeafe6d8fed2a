//! The monitor's client against peers that QEMU would never be, or that later versions may be.

mod support;

use std::{os::fd::OwnedFd, time::Duration};

use qmp_client::{Command, Ending, Malformation, Options, Qmp, QmpError};
use serde_json::{Value, json};
use support::{SOON, Stage, impatient, options};
use tokio::sync::broadcast::error::RecvError;

fn command(name: &str) -> Command {
    Command::new(name, Value::Null)
}

#[tokio::test]
async fn an_event_newer_than_any_schema_survives() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let mut events = qmp.events();
    peer.say(&json!({"event": "FROM_THE_FUTURE", "data": {"x": [1]}, "later": true})).await;
    peer.say(&json!({"something": "else"})).await;
    let event = events.recv().await.unwrap();
    assert_eq!((event.name.as_str(), event.data), ("FROM_THE_FUTURE", json!({"x": [1]})));
    assert_eq!(event.timestamp, None);
    let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
        let asked = peer.hear().await;
        peer.say(&json!({"return": 1, "id": asked["id"], "later": true})).await;
    });
    assert_eq!(result.unwrap(), 1);
}

#[tokio::test]
async fn a_lagging_receiver_is_told_and_blocks_nobody() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let mut events = qmp.events();
    for _ in 0..5000 {
        peer.say(&json!({"event": "E"})).await;
    }
    let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
        let asked = peer.hear().await;
        peer.say(&json!({"return": {}, "id": asked["id"]})).await;
    });
    result.unwrap();
    assert!(matches!(events.recv().await, Err(RecvError::Lagged(n)) if n > 3000));
}

#[tokio::test]
async fn a_reply_may_be_split_at_every_byte() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let template = r#"{"return": {"a": "}\"{\\"}, "id": 00000}"#;
    for cut in 0..template.len() + 2 {
        let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
            let asked = peer.hear().await;
            let reply = template.replace("00000", &format!("{:>5}", asked["id"].as_u64().unwrap()))
                + "\r\n";
            let (head, tail) = reply.as_bytes().split_at(cut);
            peer.say_bytes(head).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
            peer.say_bytes(tail).await;
        });
        assert_eq!(result.unwrap(), json!({"a": "}\"{\\"}), "cut at {cut}");
    }
}

#[tokio::test]
async fn replies_in_one_read_and_in_any_order_find_their_commands() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let (a, b, ()) = tokio::join!(qmp.execute(command("a")), qmp.execute(command("b")), async {
        let (first, second) = (peer.hear().await, peer.hear().await);
        let reply = |to: &Value| json!({"return": to["execute"], "id": to["id"]}).to_string();
        peer.say_bytes((reply(&second) + "\n" + &reply(&first)).as_bytes()).await;
    });
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn replies_that_belong_to_nobody_are_ignored() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
        let asked = peer.hear().await;
        peer.say(&json!({"return": "without id"})).await;
        peer.say(&json!({"return": "unknown id", "id": 4_000_000})).await;
        peer.say(&json!({"return": "odd id", "id": {"a": []}})).await;
        peer.say(&json!({"error": {"class": "GenericError", "desc": "without id"}})).await;
        peer.say(&json!({"return": "right", "id": asked["id"]})).await;
        peer.say(&json!({"return": "twice", "id": asked["id"]})).await;
    });
    assert_eq!(result.unwrap(), "right");
    let (result, ()) = tokio::join!(qmp.execute(command("b")), async {
        let asked = peer.hear().await;
        peer.say(&json!({"return": "next", "id": asked["id"]})).await;
    });
    assert_eq!(result.unwrap(), "next");
}

#[tokio::test]
async fn a_huge_line_ends_the_connection_not_the_memory() {
    let stage = Stage::new();
    let limited = Options { reply_len_max: 1 << 20, ..options() };
    let (qmp, mut peer) = stage.monitor(limited, false).await;
    let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
        peer.hear().await;
        peer.say_bytes(b"{\"return\": \"").await;
        peer.say_bytes(&vec![b'x'; 4 << 20]).await;
    });
    let error = result.unwrap_err();
    assert!(matches!(error, QmpError::ReplyTooLong { limit } if limit == 1 << 20), "{error:?}");
    assert!(error.is_gone());
    assert!(matches!(qmp.closed().await, Ending::ReplyTooLong { .. }));
    assert!(qmp.execute(command("b")).await.unwrap_err().is_gone());
}

#[tokio::test]
async fn deep_nesting_and_broken_json_end_the_connection() {
    type Check = fn(&Malformation) -> bool;
    let deep = "{\"return\": ".to_owned() + &"[".repeat(1 << 20);
    let cases: [(&str, Check); 3] = [
        (&deep, |m| matches!(m, Malformation::TooDeep { .. })),
        ("{\"return\": nonsense}\r\n", |m| matches!(m, Malformation::NotJson { .. })),
        ("garbage\r\n", |m| matches!(m, Malformation::NotAnObject { byte: b'g' })),
    ];
    for (bytes, expected) in cases {
        let stage = Stage::new();
        let (qmp, mut peer) = stage.monitor(options(), false).await;
        let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
            peer.hear().await;
            peer.say_bytes(bytes.as_bytes()).await;
        });
        let error = result.unwrap_err();
        assert!(error.is_gone());
        let QmpError::Malformed { source } = error else { panic!("{error:?}") };
        assert!(expected(&source), "{source:?}");
    }
}

#[tokio::test]
async fn the_end_of_the_stream_fails_all_that_wait() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let mut events = qmp.events();
    let (a, b, ()) = tokio::join!(qmp.execute(command("a")), qmp.execute(command("b")), async {
        peer.hear().await;
        peer.hear().await;
        drop(peer);
    });
    for (result, name) in [(a, "a"), (b, "b")] {
        assert!(matches!(result, Err(QmpError::Closed { command }) if command == name));
    }
    assert!(matches!(qmp.closed().await, Ending::HungUp));
    assert!(matches!(events.recv().await, Err(RecvError::Closed)));
    assert!(matches!(qmp.events().recv().await, Err(RecvError::Closed)));
    assert!(matches!(qmp.execute(command("c")).await, Err(QmpError::Closed { .. })));
}

#[tokio::test]
async fn a_dropped_future_only_loses_its_reply() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let given_up = tokio::time::timeout(SOON, qmp.execute(command("slow"))).await;
    assert!(given_up.is_err());
    let slow = peer.hear().await;
    assert_eq!(slow["execute"], "slow");
    let (result, ()) = tokio::join!(qmp.execute(command("next")), async {
        let asked = peer.hear().await;
        peer.say(&json!({"return": "late", "id": slow["id"]})).await;
        peer.say(&json!({"return": "mine", "id": asked["id"]})).await;
    });
    assert_eq!(result.unwrap(), "mine");
}

#[tokio::test]
async fn what_was_handed_over_is_written_after_the_last_handle_is_gone() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let mut given = Box::pin(qmp.execute_all(vec![command("stop"), command("cont")]));
    // Polled once: handed over, and nothing more.
    assert!(tokio::time::timeout(Duration::ZERO, &mut given).await.is_err());
    drop(given);
    drop(qmp);
    assert_eq!(peer.hear().await["execute"], "stop");
    let cont = peer.hear().await;
    assert_eq!(cont["execute"], "cont");
    assert!(peer.hears_nothing().await, "closed before QEMU answered");
    peer.say(&json!({"return": {}, "id": cont["id"].as_u64().unwrap() - 1})).await;
    peer.say(&json!({"return": {}, "id": cont["id"]})).await;
    assert_eq!(peer.hear_bytes().await, b"", "still open");
}

#[tokio::test]
async fn a_monitor_that_takes_no_descriptor_is_given_up_with_what_waits_for_it() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(impatient(), false).await;
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let results = qmp.execute_all(vec![command("one").fd(null), command("last")]).await;
    assert!(results.iter().all(|result| matches!(result, Err(QmpError::Timeout { .. }))));
    drop(qmp);
    let asked: Value = serde_json::from_slice(&peer.hear_until(b'}').await).unwrap();
    assert_eq!(asked["execute"], "one");
    assert_eq!(peer.hear_bytes().await, b"", "still open");
}

#[tokio::test]
async fn a_command_has_its_own_deadline() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let error = qmp.execute(command("slow").deadline(SOON)).await.unwrap_err();
    assert!(matches!(&error, QmpError::Timeout { command, waited }
        if command == "slow" && *waited == SOON));
    assert!(!error.is_gone());
    peer.hear().await;
}

#[tokio::test]
async fn at_most_eight_commands_are_with_qemu_and_out_of_band_ones_pass_them() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), true).await;
    let mut running = tokio::task::JoinSet::new();
    for n in 0..20 {
        let qmp = qmp.clone();
        running.spawn(async move { qmp.execute(command(&format!("c{n}"))).await.unwrap() });
    }
    let mut with_qemu = Vec::new();
    for _ in 0..8 {
        with_qemu.push(peer.hear().await);
    }
    assert!(peer.hears_nothing().await, "a ninth command was sent");
    let (result, ()) = tokio::join!(qmp.execute(command("urgent").out_of_band()), async {
        let asked = peer.hear().await;
        assert_eq!(asked["exec-oob"], "urgent");
        peer.say(&json!({"return": "now", "id": asked["id"]})).await;
    });
    assert_eq!(result.unwrap(), "now");
    for _ in 0..12 {
        peer.say(&json!({"return": {}, "id": with_qemu.remove(0)["id"]})).await;
        with_qemu.push(peer.hear().await);
    }
    for asked in with_qemu {
        peer.say(&json!({"return": {}, "id": asked["id"]})).await;
    }
    assert_eq!(running.join_all().await.len(), 20);
}

#[tokio::test]
async fn p2_a_list_longer_than_the_limit_goes_out_whole() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let list = (0..20).map(|n| command(&format!("c{n}"))).collect();
    let (results, ()) = tokio::join!(qmp.execute_all(list), async {
        let mut heard = Vec::new();
        for _ in 0..20 {
            heard.push(peer.hear().await);
        }
        for asked in heard {
            peer.say(&json!({"return": {}, "id": asked["id"]})).await;
        }
    });
    assert!(results.iter().all(Result::is_ok));
}

#[tokio::test]
async fn without_the_offer_out_of_band_is_sent_in_band() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let (result, ()) = tokio::join!(qmp.execute(command("urgent").out_of_band()), async {
        let asked = peer.hear().await;
        assert_eq!(asked["execute"], "urgent");
        peer.say(&json!({"return": {}, "id": asked["id"]})).await;
    });
    result.unwrap();
}

#[tokio::test]
async fn p1_not_a_byte_follows_a_descriptor_until_it_is_taken() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), true).await;
    let with_fd =
        |name: &str| command(name).fd(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let all =
        qmp.execute_all(vec![command("zero"), with_fd("one"), with_fd("two"), command("last")]);
    let urgent = async {
        tokio::time::sleep(SOON / 2).await;
        qmp.execute(command("urgent").out_of_band()).await
    };
    let (results, urgent, ()) = tokio::join!(all, urgent, async {
        let zero = peer.hear().await;
        peer.say(&json!({"return": {}, "id": zero["id"]})).await;
        for name in ["one", "two"] {
            let asked: Value = serde_json::from_slice(&peer.hear_until(b'}').await).unwrap();
            assert_eq!(asked["execute"], name);
            assert!(peer.hears_nothing().await, "something follows {name}");
            peer.say(&json!({"return": {}, "id": asked["id"]})).await;
        }
        for asked in [peer.hear().await, peer.hear().await] {
            assert!(asked["execute"] == "last" || asked["exec-oob"] == "urgent", "{asked}");
            peer.say(&json!({"return": {}, "id": asked["id"]})).await;
        }
    });
    assert!(results.iter().all(Result::is_ok));
    urgent.unwrap();
}

#[tokio::test]
async fn who_does_not_speak_qmp_is_told_apart_from_a_busy_monitor() {
    let says: [&[u8]; 5] = [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
        b"{\"return\": {}}\n",
        b"\xff{\"return\": 5}\n",
        b"", // hangs up
    ];
    for bytes in says {
        let stage = Stage::new();
        let (result, ()) = tokio::join!(Qmp::connect(stage.socket(), options()), async {
            let mut peer = stage.accept().await;
            peer.say_bytes(bytes).await;
        });
        assert!(matches!(result, Err(QmpError::NotQmp { .. })), "{bytes:?}");
    }
    // Taken, but silent: a guest agent or a serial console.
    let stage = Stage::new();
    let (result, _peer) = tokio::join!(Qmp::connect(stage.socket(), impatient()), stage.accept());
    assert!(matches!(result, Err(QmpError::NotQmp { .. })));
    // Never taken: somebody else is served.
    let result = Qmp::connect(stage.socket(), impatient()).await;
    assert!(matches!(result, Err(QmpError::NoGreeting { waited, .. }) if waited >= SOON));
}

#[tokio::test]
async fn a_missing_socket_is_an_error_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let result = Qmp::connect(&folder.path().join("none"), options()).await;
    assert!(matches!(result, Err(QmpError::Connect { source, .. })
        if source.kind() == std::io::ErrorKind::NotFound));
}

#[tokio::test]
async fn a_refusal_is_printed_without_its_terminal_escapes() {
    let stage = Stage::new();
    let (qmp, mut peer) = stage.monitor(options(), false).await;
    let (result, ()) = tokio::join!(qmp.execute(command("a")), async {
        let asked = peer.hear().await;
        let error = json!({"class": "DeviceNotFound", "desc": "no '\u{1b}[2Jx'"});
        peer.say(&json!({"error": error, "id": asked["id"]})).await;
    });
    let error = result.unwrap_err();
    assert!(error.is_refused_as("DeviceNotFound"));
    assert_eq!(error.to_string(), "QEMU refused `a`: no '\\u{1b}[2Jx'");
}
