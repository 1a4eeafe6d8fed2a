//! Who is told of what, with a real mail server and a web server on loopback.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use integration::Host;
use serde_json::Value;

/// What must appear nowhere but where it is sent.
const CANARY: &str = "c4n4ry-5ecret";

/// A mail server with STARTTLS and accounts, and a web server; each message is one line of a file.
const SERVERS: &str = r#"
import asyncio, http.server, json, ssl, sys, threading
from aiosmtpd.smtp import SMTP, AuthResult
folder, password = sys.argv[1], sys.argv[2]
lock = threading.Lock()

def keep(line):
    with lock, open(folder + "/kept", "a") as kept:
        kept.write(json.dumps(line) + "\n")

class Mail:
    async def handle_DATA(self, server, session, envelope):
        keep({"from": envelope.mail_from, "to": envelope.rcpt_tos, "mail": envelope.content.decode()})
        return "250 taken"

def account(server, session, envelope, mechanism, data):
    return AuthResult(success=data.login == b"host" and data.password == password.encode())

class Web(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
        keep({"path": self.path, "body": body, "authorization": self.headers["authorization"]})
        self.send_response(500 if self.path.startswith("/broken") else 204)
        self.end_headers()
    def log_message(self, *_):
        pass

tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
tls.load_cert_chain(folder + "/server.pem")
async def mail():
    server = lambda: SMTP(Mail(), tls_context=tls, require_starttls=True, auth_required=True,
                          authenticator=account)
    return await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
loop = asyncio.new_event_loop()
mail = loop.run_until_complete(mail())
threading.Thread(target=loop.run_forever, daemon=True).start()
web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
print(mail.sockets[0].getsockname()[1], web.server_port, flush=True)
threading.Thread(target=web.serve_forever, daemon=True).start()
sys.stdin.read()
"#;

struct Servers {
    process: Child,
    folder: PathBuf,
    mail: String,
    web: String,
}

impl Servers {
    fn start(host: &Host) -> Self {
        let folder = host.folder().join("servers");
        fs::create_dir(&folder).expect("a new folder");
        certificate(&folder);
        let mut process = Command::new("/usr/bin/python3")
            .args(["-c", SERVERS, &folder.display().to_string(), CANARY])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Debian's python3");
        let mut ports = String::new();
        BufReader::new(process.stdout.take().expect("it was piped"))
            .read_line(&mut ports)
            .expect("a line");
        let (mail, web) = ports.trim().split_once(' ').expect("two ports");
        Self { process, folder, mail: mail.to_owned(), web: web.to_owned() }
    }

    fn kept(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.join("kept")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A certificate for localhost by an authority of its own.
fn certificate(folder: &Path) {
    let script = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test \
                  -keyout ca.key -out ca.pem 2>&1 && \
                  openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key \
                  -out server.csr 2>&1 && \
                  printf 'subjectAltName=DNS:localhost\\nbasicConstraints=CA:FALSE\\n' > ext && \
                  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                  -extfile ext -out server.crt 2>&1 && cat server.key server.crt > server.pem";
    let made = Command::new("sh").args(["-c", script]).current_dir(folder).output().expect("sh");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
}

fn configure(host: &Host, text: &str) {
    fs::write(host.config(), text).expect("a configuration");
}

#[test]
fn s09_everybody_is_told_and_no_secret_is() {
    let host = Host::without_repository();
    let servers = Servers::start(&host);
    let secret = host.folder().join("secret");
    writeln!(fs::File::create(&secret).expect("a file"), "{CANARY}").expect("a line");
    let program = host.folder().join("program.json");
    configure(
        &host,
        &format!(
            "[alerts.mail]\nto = [\"Root <root@localhost>\"]\nfrom = \"kvmsnap@localhost\"\n\
             server = \"localhost\"\nport = {mail}\nencryption = \"starttls\"\nuser = \"host\"\n\
             password-file = \"{secret}\"\n\
             [[alerts.webhook]]\nurl = \"http://127.0.0.1:{web}/hook\"\ntoken-file = \"{secret}\"\n\
             [[alerts.webhook]]\nurl = \"http://127.0.0.1:{web}/recoveries\"\non = [\"recovery\"]\n\
             [[alerts.command]]\nrun = [\"sh\", \"-c\", \"cat > '{program}'; echo $KVMSNAP_ALERT >> '{program}'\"]\n",
            mail = servers.mail,
            web = servers.web,
            secret = secret.display(),
            program = program.display(),
        ),
    );

    let mut command = host.command(["alert", "--kind", "failure", "the disk is on fire", "-vv"]);
    command.env("SSL_CERT_FILE", servers.folder.join("ca.pem"));
    let told = integration::finish(integration::spawn(command));

    assert_eq!(told.code, Some(0), "{}", told.stderr);
    let said = format!("{}{}", told.stdout, told.stderr);
    assert!(said.contains("told: mail to root@localhost"), "{said}");
    assert!(!said.contains(CANARY), "{said}");
    let kept = servers.kept();
    let mail = kept.iter().find(|message| message["mail"].is_string()).expect("a mail");
    assert_eq!(mail["to"][0], "root@localhost");
    let text = mail["mail"].as_str().expect("text");
    assert!(text.contains("the disk is on fire") && !text.contains(CANARY), "{text}");
    let hook = kept.iter().find(|message| message["path"] == "/hook").expect("a webhook");
    assert_eq!(hook["authorization"], format!("Bearer {CANARY}"));
    let body: Value = serde_json::from_str(hook["body"].as_str().expect("text")).expect("JSON");
    assert_eq!(body["events"][0]["kind"], "failure");
    assert!(kept.iter().all(|message| message["path"] != "/recoveries"), "{kept:?}");
    let by_program = fs::read_to_string(program).expect("what the program was told");
    assert!(by_program.contains("the disk is on fire"), "{by_program}");
}

#[test]
fn s09_a_channel_that_fails_keeps_nobody_from_the_others_and_its_address_stays_secret() {
    let host = Host::without_repository();
    let servers = Servers::start(&host);
    configure(
        &host,
        &format!(
            "[alerts.mail]\nto = [\"root@localhost\"]\nfrom = \"kvmsnap@localhost\"\nport = 1\n\
             [[alerts.webhook]]\nurl = \"http://127.0.0.1:{web}/broken?{CANARY}\"\n\
             [[alerts.webhook]]\nurl = \"http://127.0.0.1:{web}/hook\"\n\
             [[alerts.command]]\nrun = [\"sh\", \"-c\", \"echo no tape >&2; exit 7\"]\n\
             [[alerts.command]]\nrun = [\"/does/not/exist\"]\n\
             [alerts.ping]\nurl = \"http://127.0.0.1:{web}/alive\"\n",
            web = servers.web,
        ),
    );

    let told = host.run(["alert", "--json"]);

    assert_eq!(told.code, Some(1), "{}", told.stderr);
    assert!(
        told.stderr.contains("4 of those who are to be told cannot be told"),
        "{}",
        told.stderr
    );
    assert!(told.stderr.contains("no tape"), "{}", told.stderr);
    // The part of the address that may be a secret.
    assert!(!format!("{}{}", told.stdout, told.stderr).contains(CANARY), "{}", told.stderr);
    for path in ["/hook", "/alive"] {
        assert!(servers.kept().iter().any(|message| message["path"] == path), "{path}");
    }
}
