"""A customer's website: a counter in memory, and a journal on the disk that is flushed before each
answer. It tells how it fares: / a page, /check the whole journal read again."""
import hashlib, os, socket, time

JOURNAL = "/var/lib/website/journal"
NOISE_MIB = 8


def line(number, last):
    """Each line's digest covers the line before: one that is lost or old shows."""
    digest = hashlib.sha256(f"{last} {number}".encode()).hexdigest()
    return f"{number} {digest}"


def check():
    """What is read from the disk, not from the cache."""
    os.posix_fadvise(journal, 0, 0, os.POSIX_FADV_DONTNEED)
    wrong, last = 0, ""
    with open(JOURNAL) as text:
        for number, found in enumerate(text, 1):
            last = line(number, last)
            wrong += found != last + "\n"
    if last != newest:
        wrong += 1
    if hashlib.sha256(noise).digest() != noise_digest:
        wrong += 1
    return f"filled_mib {NOISE_MIB}\nwrong_words {wrong}\n"


def page():
    global counter, newest, clock, clock_back
    counter += 1
    newest = line(counter, newest)
    os.write(journal, (newest + "\n").encode())
    os.fdatasync(journal)
    now = time.monotonic_ns()
    clock_back += now < clock
    clock = now
    return (
        f"counter {counter}\nuptime {time.clock_gettime(time.CLOCK_BOOTTIME):.2f}\n"
        f"boot_id {boot_id}\ncorrupt 0\nclock_back {clock_back}\n"
    )


def answer(client):
    client.settimeout(10)
    request = b""
    while b"\r\n\r\n" not in request and len(request) < 2048:
        part = client.recv(512)
        if not part:
            return
        request += part
    is_check = request.startswith(b"GET /check ")
    body = check() if is_check else page()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    client.sendall((head + body).encode())


os.makedirs(os.path.dirname(JOURNAL), exist_ok=True)
journal = os.open(JOURNAL, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
noise = os.urandom(NOISE_MIB << 20)
noise_digest = hashlib.sha256(noise).digest()
boot_id = open("/proc/sys/kernel/random/boot_id").read().strip()
counter, newest, clock, clock_back = 0, "", 0, 0
server = socket.create_server(("", 80), backlog=16)
while True:
    client, _ = server.accept()
    with client:
        try:
            answer(client)
        except OSError:
            # A client that goes away is its own affair.
            pass
