//! R15 and S07: a guest agent that is hung, late, doubled, partial, huge or hostile.

mod support;

use std::time::Duration;

use qmp_client::{Malformation, Qga, QgaError};
use serde_json::{Value, json};
use support::{Peer, SOON, Stage, impatient, options};

const LONG: Duration = Duration::from_secs(120);

/// One command that the agent answers as it should.
async fn works(qga: &Qga, peer: &mut Peer) {
    let (result, ()) = tokio::join!(qga.execute("guest-ping", Value::Null, LONG), async {
        peer.answer_sync().await;
        let asked = peer.hear().await;
        assert_eq!(asked, json!({"execute": "guest-ping"}));
        peer.say(&json!({"return": {"fine": true}})).await;
    });
    assert_eq!(result.unwrap(), json!({"fine": true}));
}

#[tokio::test]
async fn r15_a_late_answer_is_not_taken_for_the_next_one() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) =
        tokio::join!(qga.execute("guest-fsfreeze-freeze", Value::Null, SOON), async {
            peer.answer_sync().await;
            peer.hear().await;
        });
    assert!(matches!(result, Err(QgaError::Timeout { command, .. })
        if command == "guest-fsfreeze-freeze"));
    let (result, ()) = tokio::join!(qga.execute("guest-fsfreeze-thaw", Value::Null, LONG), async {
        let id = peer.hear_sync().await;
        peer.say(&json!({"return": 77})).await; // of the freeze
        peer.say_sync(&id).await;
        peer.hear().await;
        peer.say(&json!({"return": 2})).await;
    });
    assert_eq!(result.unwrap(), 2);
}

#[tokio::test]
async fn r15_an_agent_that_answers_twice_is_not_believed_twice() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say(&json!({"return": "once"})).await;
        peer.say(&json!({"return": "twice"})).await;
    });
    assert_eq!(result.unwrap(), "once");
    works(&qga, &mut peer).await;
}

#[tokio::test]
async fn r15_a_hung_agent_is_never_sent_the_command() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let error = qga.execute("guest-fsfreeze-freeze", Value::Null, SOON).await.unwrap_err();
    assert!(matches!(error, QgaError::NotAnswering { waited, .. } if waited == SOON));
    // It wakes up: what it hears is a synchronisation and no freeze.
    let old = peer.hear_sync().await;
    assert!(peer.hears_nothing().await);
    let (result, ()) = tokio::join!(qga.execute("guest-ping", Value::Null, LONG), async {
        let id = peer.hear_sync().await;
        peer.say_sync(&old).await;
        peer.say_sync(&id).await;
        peer.hear().await;
        peer.say_sync(&old).await; // once more, where a reply is due
        peer.say(&json!({"return": {}})).await;
    });
    assert_eq!(result.unwrap(), json!({}));
}

#[tokio::test]
async fn r15_half_an_answer_costs_one_command() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    // Half a line that never ends, then the agent restarts.
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, SOON), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say_bytes(b"{\"return\": {\"half").await;
    });
    assert!(matches!(result, Err(QgaError::Timeout { .. })));
    works(&qga, &mut peer).await;
    // Half an object, but a whole line.
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say_bytes(b"{\"return\": {\"half\n").await;
    });
    assert!(matches!(
        result,
        Err(QgaError::Malformed { source: Malformation::NotJson { .. }, .. })
    ));
    works(&qga, &mut peer).await;
}

#[tokio::test]
async fn r15_a_dropped_future_leaves_a_usable_connection() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    for heard in 0..3 {
        let given_up = tokio::time::timeout(SOON, qga.execute("a", Value::Null, LONG));
        let (result, ()) = tokio::join!(given_up, async {
            let id = peer.hear_sync().await;
            if heard > 0 {
                peer.say_sync(&id).await;
                peer.hear().await;
            }
            if heard > 1 {
                peer.say_bytes(b"{\"retu").await;
            }
        });
        assert!(result.is_err());
        works(&qga, &mut peer).await;
    }
}

#[tokio::test]
async fn s07_forged_sync_answers_are_discarded() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        let id = peer.hear_sync().await;
        let number = id.as_u64().unwrap();
        peer.say_sync(&json!(number ^ 1)).await;
        peer.say_sync(&json!(number.to_string())).await;
        peer.say_sync(&json!(-1)).await;
        peer.say(&json!({ "return": id })).await; // right, but not delimited: cannot be an answer
        assert!(peer.hears_nothing().await, "a forged answer was believed");
        peer.say_sync(&id).await;
        peer.hear().await;
        peer.say(&json!({"return": "true"})).await;
    });
    assert_eq!(result.unwrap(), "true");
}

#[tokio::test]
async fn s07_sync_ids_do_not_repeat() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let mut ids = std::collections::HashSet::new();
    for _ in 0..50 {
        let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
            let id = peer.hear_sync().await;
            assert!(ids.insert(id.as_u64().unwrap()));
            peer.say_sync(&id).await;
            peer.hear().await;
            peer.say(&json!({"return": {}})).await;
        });
        result.unwrap();
    }
}

#[tokio::test]
async fn s07_a_huge_answer_is_refused_and_the_next_command_works() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say_bytes(b"{\"return\": \"").await;
        peer.say_bytes(&vec![b'x'; (1 << 20) + 1000]).await;
    });
    assert!(matches!(result, Err(QgaError::TooLong { limit, .. }) if limit == 1 << 20));
    peer.say_bytes(&vec![b'y'; 100_000]).await; // waits in the socket's buffer
    peer.say_bytes(b"\"}\n").await;
    works(&qga, &mut peer).await;
}

#[tokio::test]
async fn s07_an_endless_answer_to_the_synchronisation_ends_by_its_deadline() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let flood = async {
        loop {
            peer.say_bytes(&[b'x'; 60_000]).await;
        }
    };
    tokio::select! {
        result = qga.execute("a", Value::Null, SOON) => {
            assert!(matches!(result, Err(QgaError::NotAnswering { .. })));
        }
        () = flood => {}
        () = tokio::time::sleep(LONG) => panic!("no deadline"),
    }
}

#[tokio::test]
async fn s07_hostile_answers_are_errors_not_panics() {
    let deep = format!("{{\"return\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let answers: [&[u8]; 7] = [
        deep.as_bytes(),
        b"[]",
        b"7",
        b"\x80\xfe{}",
        b"{\"return\"}",
        b"{\"neither\": 1}",
        b"{\"QMP\": {}}",
    ];
    for answer in answers {
        let stage = Stage::new();
        let (qga, mut peer) = stage.agent().await;
        let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
            peer.answer_sync().await;
            peer.hear().await;
            peer.say_bytes(answer).await;
            peer.say_bytes(b"\n").await;
        });
        assert!(matches!(result, Err(QgaError::Malformed { .. })), "{result:?}");
        works(&qga, &mut peer).await;
    }
}

#[tokio::test]
async fn s07_a_refusal_is_printed_without_its_terminal_escapes() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        peer.answer_sync().await;
        peer.hear().await;
        peer.say(&json!({"error": {"class": "GenericError", "desc": "\u{1b}]0;owned\u{7}"}})).await;
    });
    let error = result.unwrap_err();
    assert_eq!(error.to_string(), "the guest agent refused `a`: \\u{1b}]0;owned\\u{7}");
}

#[tokio::test]
async fn who_is_no_agent_is_told_apart() {
    // Nobody in the guest listens.
    let stage = Stage::new();
    let (result, _peer) = tokio::join!(Qga::connect(stage.socket(), impatient()), stage.accept());
    assert!(matches!(result, Err(QgaError::NotAnswering { .. })));
    // Another client is served.
    let result = Qga::connect(stage.socket(), impatient()).await;
    assert!(matches!(result, Err(QgaError::Busy { .. })));
    // A monitor.
    let stage = Stage::new();
    let (result, ()) = tokio::join!(Qga::connect(stage.socket(), options()), async {
        let mut peer = stage.accept().await;
        peer.say(&json!({"QMP": {"version": {}, "capabilities": []}})).await;
        peer.hear_bytes().await;
    });
    assert!(matches!(result, Err(QgaError::NotQga { .. })));
    // Nothing at all.
    let result = Qga::connect(&stage.socket().with_file_name("none"), options()).await;
    assert!(matches!(result, Err(QgaError::Connect { .. })));
}

#[tokio::test]
async fn the_end_of_the_stream_is_told() {
    let stage = Stage::new();
    let (qga, mut peer) = stage.agent().await;
    let (result, ()) = tokio::join!(qga.execute("a", Value::Null, LONG), async {
        peer.answer_sync().await;
        peer.hear().await;
        drop(peer);
    });
    assert!(matches!(result, Err(QgaError::Closed { command }) if command == "a"));
    let result = qga.execute("b", Value::Null, LONG).await;
    assert!(matches!(result, Err(QgaError::Closed { .. })));
}
