package capture

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/crypto/cryptobyte"
)

const (
	// maxPending bounds the bytes of one direction held until a gap closes.
	maxPending = 4 << 20
	// maxRecord is the longest TLS 1.3 record (RFC 8446 section 5.2).
	maxRecord = 1<<14 + 256
	// maxFlows bounds the connections that are followed.
	maxFlows = 1 << 16
)

// flowKey names a connection by the end that opened it.
type flowKey struct{ client, server netip.AddrPort }

// flow is one TCP connection to an allowed server.
type flow struct {
	fromClient, fromServer stream
	last                   frame
}

// tcp judges one segment: it has to belong to a connection that the laptop
// opened to an allowed server, and its bytes have to be TLS 1.3.
func (c *checker) tcp(payload []byte, src, dst netip.Addr, f frame) {
	var seg layers.TCP
	if err := seg.DecodeFromBytes(payload, feedback{}); err != nil {
		c.leak(f, "malformed TCP header")
		return
	}
	from, to := netip.AddrPortFrom(src, uint16(seg.SrcPort)), netip.AddrPortFrom(dst, uint16(seg.DstPort))
	f.source, f.dst = from.String(), to.String()
	key, toServer := flowKey{from, to}, true
	if !slices.Contains(c.allow.Servers, to) {
		if key, toServer = (flowKey{to, from}), false; !slices.Contains(c.allow.Servers, from) {
			c.leak(f, "TCP to an address that is not the organisation's")
			return
		}
	}
	if !f.whole {
		c.leak(f, "segment cut short by the capture: its content cannot be judged")
		return
	}
	fl := c.flows[key]
	if toServer && seg.SYN && !seg.ACK && (fl == nil || fl.fromClient.next != seg.Seq+1) {
		if len(c.flows) >= maxFlows {
			c.leak(f, "more connections than can be followed")
			return
		}
		c.report.Flows[key.server.String()]++
		fl = &flow{fromClient: stream{client: true, synced: true, next: seg.Seq + 1}}
		c.flows[key] = fl
	}
	if fl == nil {
		if len(seg.Payload) == 0 && (seg.RST || seg.FIN || seg.ACK) {
			c.allowed("tls") // the end of a connection that a capture began after; no content
			return
		}
		if c.allow.Midway {
			c.allowed("midway")
			return
		}
		c.leak(f, "content of a connection whose beginning was not seen")
		return
	}
	s := &fl.fromServer
	if toServer {
		s = &fl.fromClient
	} else if seg.SYN {
		*s = stream{synced: true, next: seg.Seq + 1}
	}
	fl.last = f
	if err := s.segment(seg.Seq, seg.Payload, c.report.Suites); err != nil {
		f.foreign = false // what a stream of ours carries is judged both ways
		c.leak(f, err.Error())
		return
	}
	c.allowed("tls")
}

// finish files the connections with bytes that could not be judged because
// bytes before them were never seen.
func (c *checker) finish() {
	for _, fl := range c.flows {
		if n := fl.fromClient.held + fl.fromServer.held; n > 0 && !c.report.Cut {
			fl.last.foreign = false
			c.leak(fl.last, fmt.Sprintf("%d bytes of the connection follow a gap in the capture", n))
		}
	}
}

// stream puts one direction of a connection in order and reads its records.
type stream struct {
	client  bool
	synced  bool
	broken  bool // an error was reported; the rest of the stream is not read
	next    uint32
	pending []segment
	held    int // bytes in pending

	header  []byte // of the record being read
	body    []byte // of a record that is looked into
	left    int    // bytes of the record to come
	hellos  int    // handshake records in the clear
	alerts  int    // alert records in the clear
	applied bool   // application data was seen
}

type segment struct {
	seq  uint32
	data []byte
}

// segment adds data that begins at sequence number seq.
func (s *stream) segment(seq uint32, data []byte, suites map[string]int) error {
	if len(data) == 0 || s.broken {
		return nil
	}
	if !s.synced {
		return s.fail("content before the connection was open")
	}
	if int32(seq-s.next) > 0 {
		if s.held += len(data); s.held > maxPending {
			return s.fail("more out of order than can be held")
		}
		s.pending = append(s.pending, segment{seq, slices.Clone(data)})
		return nil
	}
	if err := s.inOrder(seq, data, suites); err != nil {
		return err
	}
	for {
		i := slices.IndexFunc(s.pending, func(p segment) bool { return int32(p.seq-s.next) <= 0 })
		if i < 0 {
			return nil
		}
		p := s.pending[i]
		s.pending = slices.Delete(s.pending, i, i+1)
		s.held -= len(p.data)
		if err := s.inOrder(p.seq, p.data, suites); err != nil {
			return err
		}
	}
}

// inOrder reads the part of data that is new.
func (s *stream) inOrder(seq uint32, data []byte, suites map[string]int) error {
	known := int(s.next - seq)
	if known >= len(data) {
		return nil
	}
	data = data[known:]
	s.next += uint32(len(data))
	for len(data) > 0 {
		if len(s.header) < 5 {
			n := min(5-len(s.header), len(data))
			s.header, data = append(s.header, data[:n]...), data[n:]
			if len(s.header) < 5 {
				return nil
			}
			if err := s.begin(); err != nil {
				return err
			}
		}
		n := min(s.left, len(data))
		if s.header[0] == recordHandshake {
			s.body = append(s.body, data[:n]...)
		}
		s.left, data = s.left-n, data[n:]
		if s.left == 0 {
			if err := s.end(suites); err != nil {
				return err
			}
		}
	}
	return nil
}

// TLS record types and handshake messages (RFC 8446 sections 5.1 and 4).
const (
	recordCCS       = 20
	recordAlert     = 21
	recordHandshake = 22
	recordData      = 23
	clientHello     = 1
	serverHello     = 2
)

// begin judges a record by its header. In TLS 1.3 only hellos, the dummy
// change_cipher_spec and early alerts are ever in the clear.
func (s *stream) begin() error {
	kind, version, length := s.header[0], binary.BigEndian.Uint16(s.header[1:]), int(binary.BigEndian.Uint16(s.header[3:]))
	s.left, s.body = length, s.body[:0]
	first := s.hellos == 0 && s.alerts == 0 && !s.applied
	switch {
	case version != tls.VersionTLS12 && !(first && s.client && version == tls.VersionTLS10):
		return s.fail("not TLS: record version 0x%04x", version)
	case length == 0 || length > maxRecord:
		return s.fail("TLS record of %d bytes", length)
	case kind == recordHandshake && !s.applied && s.hellos < 2:
		s.hellos++ // a second one follows a HelloRetryRequest
	case s.hellos == 0 && kind != recordAlert:
		return s.fail("first record of the connection is of type %d, not a hello", kind)
	case kind == recordAlert && length == 2 && s.alerts == 0 && !s.applied:
		s.alerts++
	case kind == recordCCS && length == 1 && !s.applied:
	case kind == recordData:
		s.applied = true
	default:
		return s.fail("TLS record of type %d and %d bytes in the clear", kind, length)
	}
	return nil
}

// end looks into a finished record.
func (s *stream) end(suites map[string]int) error {
	kind := s.header[0]
	s.header = s.header[:0]
	if kind != recordHandshake {
		return nil
	}
	suite, err := readHello(s.body, s.client)
	if err != nil {
		return s.fail("%w", err)
	}
	if suite != 0 {
		suites[tls.CipherSuiteName(suite)]++
	}
	return nil
}

func (s *stream) fail(format string, a ...any) error {
	s.broken, s.pending, s.held = true, nil, 0
	return fmt.Errorf(format, a...)
}

// retryRandom is the random of a ServerHello that is a HelloRetryRequest (RFC
// 8446 section 4.1.3).
var retryRandom = sha256.Sum256([]byte("HelloRetryRequest"))

// readHello checks that record holds exactly one hello that offers (client) or
// selects (server) TLS 1.3. It returns the suite that a server selected.
func readHello(record []byte, client bool) (suite uint16, err error) {
	bad := func(what string) (uint16, error) { return 0, fmt.Errorf("not a TLS 1.3 hello: %s", what) }
	want := uint8(serverHello)
	if client {
		want = clientHello
	}
	var kind uint8
	var body, random, session, extensions cryptobyte.String
	in := cryptobyte.String(record)
	if !in.ReadUint8(&kind) || kind != want || !in.ReadUint24LengthPrefixed(&body) || !in.Empty() {
		return bad("wrong message or length")
	}
	if !body.Skip(2) || !body.ReadBytes((*[]byte)(&random), 32) || !body.ReadUint8LengthPrefixed(&session) {
		return bad("malformed")
	}
	if client {
		var list, methods cryptobyte.String
		if !body.ReadUint16LengthPrefixed(&list) || !body.ReadUint8LengthPrefixed(&methods) {
			return bad("malformed")
		}
	} else if !body.ReadUint16(&suite) || !body.Skip(1) {
		return bad("malformed")
	}
	if !body.ReadUint16LengthPrefixed(&extensions) || !body.Empty() {
		return bad("no extensions")
	}
	for !extensions.Empty() {
		const supportedVersions = 43
		var id uint16
		var value cryptobyte.String
		if !extensions.ReadUint16(&id) || !extensions.ReadUint16LengthPrefixed(&value) {
			return bad("malformed extensions")
		}
		if id != supportedVersions {
			continue
		}
		list := value
		if client && !value.ReadUint8LengthPrefixed(&list) {
			return bad("malformed versions")
		}
		for !list.Empty() {
			var v uint16
			if !list.ReadUint16(&v) {
				return bad("malformed versions")
			}
			if v == tls.VersionTLS13 {
				if slices.Equal(random, retryRandom[:]) {
					suite = 0
				}
				return suite, nil
			}
		}
	}
	return bad("TLS 1.3 is not in it")
}
