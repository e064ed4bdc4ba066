/*
 * tunlink: a link between two network namespaces, emulated in user space.
 *
 *   tunlink NAMESPACE_A DEVICE_A NAMESPACE_B DEVICE_B [rate=BIT/S] [delay=MICROSECONDS] [queue=BYTES]
 *           [loss=PPM] [mtu=BYTES] [seed=NUMBER]
 *
 * It makes one TUN device in each namespace and carries IP packets between them. Each direction is on its own:
 *
 *     read ──▶ loss ──▶ queue (tail drop) ──▶ transmitter at `rate` ──▶ `delay` ──▶ write
 *
 * rate=0 is unlimited. A packet leaves the transmitter when the one before has left and its own bits have been sent
 * (virtual finish time), so the long-run rate is exact however late this process wakes. Bytes are those of the IP
 * packet. Order is kept, also while the delay is being made shorter. Time is CLOCK_MONOTONIC in nanoseconds.
 *
 * Standard output says `ready` once both devices exist. Standard input then takes one command a line and answers each
 * with `ok` or `error …`; DIRECTION is 0 (A to B), 1 (B to A) or * (both):
 *
 *     rate DIRECTION BIT/S | delay DIRECTION MICROSECONDS | queue DIRECTION BYTES | loss DIRECTION PPM
 *     down DIRECTION       loses what is queued, what is on its way, and all that comes
 *     up DIRECTION
 *     stats                two lines of counters before the `ok`
 *
 * It ends on SIGTERM or SIGINT, at the end of its standard input, and when its parent dies; then, and on SIGUSR1,
 * it prints the counters. The devices vanish with it.
 *
 * Every packet costs one read, one write and O(1) work. Packets lie one behind the other in a ring of bytes, their
 * descriptors in a second ring; nothing is allocated after the start. What does not fit is dropped and counted as
 * `overflow`, which an honest measurement must see to be 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_PACKETS = 1 << 17, BATCH = 64, LARGEST_PACKET = 65536, LINE_BYTES = 256 };
static const size_t RING_BYTES = (size_t)64 << 20;
static const uint64_t SECOND_NS = 1000000000u, FAST_REST_NS = 100000, LONGEST_REST_NS = 250000;
static const double FAST_BIT_PER_S = 500e6;

struct packet {
    uint64_t arrived_ns; /* then, once transmitted, when it is due at the far end */
    uint32_t offset;
    uint32_t length;
};

/* Descriptors [first, sent) are on their way, [sent, end) wait for the transmitter; numbers run on, slots wrap. */
struct direction {
    int from, to;
    double rate_bit_per_s;
    uint64_t delay_ns, queue_bytes, loss_ppm, dice;
    int is_down;
    struct packet *packets;
    uint8_t *ring;
    uint32_t first, sent, end;
    size_t write_at;
    uint64_t queued_bytes, free_at_ns, last_due_ns;
    uint64_t delivered, delivered_bytes, full, lost, cut, overflow;
};

static struct direction directions[2];

static void die(const char *what) {
    fprintf(stderr, "tunlink: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* splitmix64 (Steele, Lea and Flood 2014): the same seed loses the same packets. */
static uint64_t roll(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int open_tun(const char *name_space, const char *device, int mtu) {
    char path[256];
    snprintf(path, sizeof path, "/var/run/netns/%s", name_space);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || setns(file, CLONE_NEWNET)) die(path);
    close(file);
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tun < 0) die("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", device);
    if (ioctl(tun, TUNSETIFF, &request)) die(device);
    int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    request.ifr_mtu = mtu;
    if (any < 0 || ioctl(any, SIOCSIFMTU, &request)) die("mtu");
    request.ifr_qlen = 5000; /* so that bursts wait in our queue and are not dropped before it */
    if (ioctl(any, SIOCSIFTXQLEN, &request)) die("txqueuelen");
    close(any);
    return tun;
}

static void open_direction(struct direction *d, int from, int to) {
    d->from = from;
    d->to = to;
    d->packets = calloc(MOST_PACKETS, sizeof *d->packets);
    d->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!d->packets || d->ring == MAP_FAILED) die("memory");
}

/* Where the next packet may be read to, or NULL when the rings are full. A packet never wraps round the end. */
static uint8_t *room(struct direction *d) {
    if (d->first == d->end) { /* empty: stay at the start, where the pages are warm */
        d->write_at = 0;
        return d->ring;
    }
    if (d->end - d->first >= MOST_PACKETS) return NULL;
    size_t oldest = d->packets[d->first % MOST_PACKETS].offset;
    if (d->write_at > oldest) {
        if (RING_BYTES - d->write_at >= LARGEST_PACKET) return d->ring + d->write_at;
        d->write_at = 0;
    }
    return d->write_at < oldest && oldest - d->write_at > LARGEST_PACKET ? d->ring + d->write_at : NULL;
}

static uint64_t finish_ns(const struct direction *d, const struct packet *p) {
    uint64_t start = d->free_at_ns > p->arrived_ns ? d->free_at_ns : p->arrived_ns;
    return d->rate_bit_per_s > 0 ? start + (uint64_t)(p->length * 8e9 / d->rate_bit_per_s) : start;
}

/* Let the transmitter catch up with the time. */
static void transmit(struct direction *d, uint64_t now) {
    while (d->sent != d->end) {
        struct packet *p = &d->packets[d->sent % MOST_PACKETS];
        uint64_t finish = finish_ns(d, p);
        if (finish > now) return;
        d->free_at_ns = finish;
        d->queued_bytes -= p->length;
        uint64_t due = finish + d->delay_ns;
        p->arrived_ns = d->last_due_ns = due > d->last_due_ns ? due : d->last_due_ns;
        d->sent++;
    }
}

static void take(struct direction *d, uint64_t now) {
    static uint8_t spill[LARGEST_PACKET];
    transmit(d, now);
    for (int i = 0; i < BATCH; i++) {
        uint8_t *place = room(d);
        ssize_t length = read(d->from, place ? place : spill, LARGEST_PACKET);
        if (length <= 0) return;
        if (d->is_down) {
            d->cut++;
        } else if (d->loss_ppm && roll(&d->dice) % 1000000 < d->loss_ppm) {
            d->lost++;
        } else if (!place) {
            d->overflow++;
        } else if (d->rate_bit_per_s > 0 && d->queued_bytes + (uint64_t)length > d->queue_bytes) {
            d->full++;
        } else {
            d->packets[d->end++ % MOST_PACKETS] =
                (struct packet){.arrived_ns = now, .offset = (uint32_t)(place - d->ring), .length = (uint32_t)length};
            d->write_at = (size_t)(place - d->ring) + (size_t)length;
            d->queued_bytes += (uint64_t)length;
        }
    }
}

static void deliver(struct direction *d, uint64_t now) {
    transmit(d, now);
    for (; d->first != d->sent; d->first++) {
        struct packet *p = &d->packets[d->first % MOST_PACKETS];
        if (p->arrived_ns > now) return;
        if (write(d->to, d->ring + p->offset, p->length) == (ssize_t)p->length) {
            d->delivered++;
            d->delivered_bytes += p->length;
        } else {
            d->cut++; /* the far device is not up */
        }
    }
}

/* When the next packet is due at the far end; UINT64_MAX: none is here. The transmitter needs no waking of its own. */
static uint64_t next_ns(const struct direction *d) {
    if (d->first != d->sent) return d->packets[d->first % MOST_PACKETS].arrived_ns;
    if (d->sent != d->end) return finish_ns(d, &d->packets[d->sent % MOST_PACKETS]) + d->delay_ns;
    return UINT64_MAX;
}

static void cut(struct direction *d) {
    d->is_down = 1;
    d->cut += d->end - d->first;
    d->first = d->sent = d->end;
    d->queued_bytes = 0;
}

static void print_counters(void) {
    for (int i = 0; i < 2; i++) {
        const struct direction *d = &directions[i];
        printf("direction %d packets %" PRIu64 " bytes %" PRIu64 " full %" PRIu64 " lost %" PRIu64 " cut %" PRIu64
               " overflow %" PRIu64 "\n",
               i, d->delivered, d->delivered_bytes, d->full, d->lost, d->cut, d->overflow);
    }
    fflush(stdout);
}

static int set(struct direction *d, const char *what, double value) {
    if (value < 0) return 0;
    if (!strcmp(what, "rate")) d->rate_bit_per_s = value;
    else if (!strcmp(what, "delay")) d->delay_ns = (uint64_t)(value * 1e3);
    else if (!strcmp(what, "queue")) d->queue_bytes = (uint64_t)value;
    else if (!strcmp(what, "loss")) d->loss_ppm = (uint64_t)value;
    else return 0;
    return 1;
}

static int obey(const char *line) {
    char what[16], which[8];
    double value = 0;
    int fields = sscanf(line, "%15s %7s %lf", what, which, &value);
    if (fields == 1 && !strcmp(what, "stats")) {
        print_counters();
        return 1;
    }
    if (fields < 2 || which[1] || !strchr("01*", which[0])) return 0;
    for (int i = 0; i < 2; i++) {
        struct direction *d = &directions[i];
        if (which[0] != '*' && which[0] - '0' != i) continue;
        transmit(d, now_ns()); /* what was sent so far was sent at the old rate */
        if (fields == 2 && !strcmp(what, "down")) cut(d);
        else if (fields == 2 && !strcmp(what, "up")) d->is_down = 0;
        else if (fields != 3 || !set(d, what, value)) return 0;
    }
    return 1;
}

/* Carry out the lines that have come; 0 when nobody is left to send any. */
static int read_commands(void) {
    static char text[LINE_BYTES];
    static size_t held;
    ssize_t got = read(STDIN_FILENO, text + held, sizeof text - 1 - held);
    if (got <= 0) return got < 0 && errno == EINTR;
    held += (size_t)got;
    text[held] = 0;
    char *line = text;
    for (char *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        if (obey(line)) puts("ok");
        else printf("error: not understood: %s\n", line);
    }
    fflush(stdout);
    held = strlen(line);
    if (held == sizeof text - 1) return 0; /* no command is that long */
    memmove(text, line, held);
    return 1;
}

static int open_signals(void) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

/*
 * On a full link packets come faster than it pays to wake for each. While several wait for a transmitter, where a
 * little more changes nothing, it rests after each wake-up: a sixtieth of the delay up to 0.25 ms, on a fast link 0.1 ms
 * whatever the delay. Measured: half the processor time at 100 Mbit/s and at 1 Gbit/s, and no packet of an idle link
 * is later for it.
 */
static uint64_t rest_ns(const struct direction *d) {
    if (d->end - d->sent < 3) return 0;
    uint64_t rest = d->delay_ns / 60 < LONGEST_REST_NS ? d->delay_ns / 60 : LONGEST_REST_NS;
    return d->rate_bit_per_s >= FAST_BIT_PER_S && rest < FAST_REST_NS ? FAST_REST_NS : rest;
}

static void rest(uint64_t woken_ns) {
    uint64_t there = rest_ns(&directions[0]), back = rest_ns(&directions[1]);
    uint64_t until = woken_ns + (there > back ? there : back);
    if (until == woken_ns) return;
    struct timespec end = {(time_t)(until / SECOND_NS), (long)(until % SECOND_NS)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
}

static void run(int signals) {
    for (uint64_t now = now_ns();; rest(now)) {
        uint64_t next = UINT64_MAX;
        for (int i = 0; i < 2; i++) {
            uint64_t wanted = next_ns(&directions[i]);
            if (wanted < next) next = wanted;
        }
        now = now_ns();
        uint64_t wait = next > now ? next - now : 0;
        struct timespec timeout = {(time_t)(wait / SECOND_NS), (long)(wait % SECOND_NS)};
        struct pollfd wake[] = {{directions[0].from, POLLIN, 0},
                                {directions[1].from, POLLIN, 0},
                                {STDIN_FILENO, POLLIN, 0},
                                {signals, POLLIN, 0}};
        if (ppoll(wake, 4, next == UINT64_MAX ? NULL : &timeout, NULL) < 0 && errno != EINTR) die("poll");
        now = now_ns();
        for (int i = 0; i < 2; i++) {
            if (wake[i].revents) take(&directions[i], now);
            deliver(&directions[i], now);
        }
        struct signalfd_siginfo signal;
        if (wake[3].revents && read(signals, &signal, sizeof signal) == sizeof signal) {
            if (signal.ssi_signo != SIGUSR1) return;
            print_counters();
        }
        if (wake[2].revents && !read_commands()) return;
    }
}

int main(int count, char **words) {
    if (count < 5) {
        fprintf(stderr, "usage: tunlink NAMESPACE_A DEVICE_A NAMESPACE_B DEVICE_B [rate=] [delay=] [queue=] [loss=] "
                        "[mtu=] [seed=]\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    prctl(PR_SET_TIMERSLACK, 1); /* the default lets every wake-up be 50 µs late */
    setpriority(PRIO_PROCESS, 0, -10); /* a wire does not wait for the machine's other work; refused, so be it */
    int signals = open_signals();
    int mtu = 1500;
    for (int i = 0; i < 2; i++) directions[i].queue_bytes = UINT64_MAX;
    for (int word = 5; word < count; word++) {
        char *value = strchr(words[word], '=');
        int good = value != NULL;
        if (good) {
            *value++ = 0;
            if (!strcmp(words[word], "mtu")) mtu = atoi(value);
            else
                for (int i = 0; i < 2 && good; i++) {
                    if (!strcmp(words[word], "seed")) directions[i].dice = strtoull(value, NULL, 10) * 2 + (uint64_t)i;
                    else good = set(&directions[i], words[word], atof(value));
                }
        }
        if (!good) {
            fprintf(stderr, "tunlink: not understood: %s\n", words[word]);
            return 2;
        }
    }
    int a = open_tun(words[1], words[2], mtu), b = open_tun(words[3], words[4], mtu);
    open_direction(&directions[0], a, b);
    open_direction(&directions[1], b, a);
    puts("ready");
    fflush(stdout);
    run(signals);
    print_counters();
    return 0;
}
