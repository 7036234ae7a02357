package guestlink

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"
	"testing/iotest"
)

// vector is one entry of testdata/vectors.json. The file is frozen: entries
// are added, never changed.
type vector struct {
	Name    string `json:"name"`
	Stream  string `json:"stream"` // hexadecimal
	Repeat  int    `json:"repeat"` // the last byte comes this many more times
	Frames  int    `json:"frames"` // frames before the end
	Outcome string `json:"outcome"`
}

// outcome runs a stream through everything that a host end parses.
func outcome(r io.Reader) (frames int, name string) {
	fr := NewReader(r)
	for {
		f, err := fr.Next()
		if err == nil {
			switch f.Type {
			case TypeHello:
				var h Hello
				if h, err = ParseHello(f.Payload); err == nil {
					_, err = Agree(Hello{Version: Version}, h)
				}
			case TypeConfig:
				_, err = ParseConfig(f.Payload)
			case TypeStatus:
				_, err = ParseStatus(f.Payload)
			case TypeTime:
				_, err = ParseTime(f.Payload)
			case TypePower:
				_, err = ParsePower(f.Payload)
			case TypeProbe:
				_, err = ParseProbe(f.Payload)
			}
		}
		if err == io.EOF {
			return frames, "end"
		}
		if err != nil {
			return frames, ReasonOf(err).String()
		}
		frames++
	}
}

func TestVectors(t *testing.T) {
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			b, err := hex.DecodeString(v.Stream)
			if err != nil {
				t.Fatal(err)
			}
			if v.Repeat > 0 {
				b = append(b, bytes.Repeat(b[len(b)-1:], v.Repeat)...)
			}
			for how, r := range map[string]io.Reader{
				"whole": bytes.NewReader(b), "one byte at a time": iotest.OneByteReader(bytes.NewReader(b)),
				"halves": iotest.HalfReader(bytes.NewReader(b)),
			} {
				if n, got := outcome(r); got != v.Outcome || n != v.Frames {
					t.Errorf("%s: %d frames then %s, want %d then %s", how, n, got, v.Frames, v.Outcome)
				}
			}
		})
	}
}

func TestBatchesSurviveAnySplit(t *testing.T) {
	var stream []byte
	var want [][]byte
	for i := 0; i < 300; i++ {
		p := bytes.Repeat([]byte{byte(i)}, 1+(i*977)%MaxPacket)
		want = append(want, p)
		var err error
		if stream, err = AppendFrame(stream, TypePacket, p); err != nil {
			t.Fatal(err)
		}
	}
	r := NewReader(iotest.HalfReader(bytes.NewReader(stream)))
	for i, w := range want {
		f, err := r.Next()
		if err != nil || !bytes.Equal(f.Payload, w) {
			t.Fatalf("frame %d: %d bytes, %v; want %d bytes", i, len(f.Payload), err, len(w))
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Fatalf("after the last frame: %v, want EOF", err)
	}
}

func TestAppendFrameCaps(t *testing.T) {
	for _, c := range []struct {
		t    Type
		n    int
		want Reason
	}{
		{TypePacket, 0, ReasonEmpty}, {TypePacket, MaxPacket, ReasonNone}, {TypePacket, MaxPacket + 1, ReasonOversize},
		{TypeConfig, MaxControl + 1, ReasonOversize}, {TypeHello, 65, ReasonOversize}, {0, 1, ReasonType}, {9, 1, ReasonType},
	} {
		b, err := AppendFrame([]byte("x"), c.t, make([]byte, c.n))
		if ReasonOf(err) != c.want || (err != nil && string(b) != "x") {
			t.Errorf("%s of %d bytes: %v, want %s", c.t, c.n, err, c.want)
		}
	}
}

func TestConfigRoundTripAndFaults(t *testing.T) {
	good := Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: 1400, DNS: []netip.Addr{netip.MustParseAddr("10.1.0.53")}}
	frame, err := AppendConfig(nil, good)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := ParseConfig(frame[headerSize:]); err != nil || !c.Equal(good) {
		t.Fatalf("round trip: %+v, %v", c, err)
	}
	for name, c := range map[string]Config{
		"zero": {}, "subnet": {Address: netip.MustParsePrefix("10.80.0.0/24"), MTU: 1400},
		"loopback":  {Address: netip.MustParsePrefix("127.0.0.1/32"), MTU: 1400},
		"multicast": {Address: netip.MustParsePrefix("224.0.0.1/32"), MTU: 1400},
		"v4 in v6":  {Address: netip.MustParsePrefix("::ffff:10.80.0.2/128"), MTU: 1400},
		"small mtu": {Address: good.Address, MTU: 1279}, "large mtu": {Address: good.Address, MTU: 65536},
		"dns loopback": {Address: good.Address, MTU: 1400, DNS: []netip.Addr{netip.MustParseAddr("::1")}},
		"dns zone":     {Address: good.Address, MTU: 1400, DNS: []netip.Addr{netip.MustParseAddr("fe80::1%eth0\nnameserver")}},
		"many dns":     {Address: good.Address, MTU: 1400, DNS: make([]netip.Addr, MaxDNS+1)},
	} {
		if err := c.Validate(); err == nil {
			t.Errorf("%s: valid", name)
		}
		if b, err := AppendConfig(nil, c); err == nil || len(b) > 0 {
			t.Errorf("%s: appended", name)
		}
	}
}

func TestAgreeAcrossVersions(t *testing.T) {
	newer := Hello{Version: 7, Capabilities: 0xff}
	if h, err := Agree(Hello{Version: Version}, newer); err != nil || h.Version != Version || h.Capabilities != 0 {
		t.Errorf("with a newer end: %+v, %v", h, err)
	}
	if _, err := Agree(Hello{Version: Version}, Hello{}); ReasonOf(err) != ReasonVersion {
		t.Errorf("with version 0: %v", err)
	}
}

func TestParseIP(t *testing.T) {
	v4 := []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
	v6 := make([]byte, 40)
	v6[0] = 0x60
	src, dst, err := ParseIP(v4)
	if err != nil || src.String() != "10.0.0.1" || dst.String() != "10.0.0.2" {
		t.Errorf("v4: %s %s %v", src, dst, err)
	}
	if _, _, err := ParseIP(v6); err != nil {
		t.Errorf("v6: %v", err)
	}
	change := func(b []byte, i int, v byte) []byte { c := bytes.Clone(b); c[i] = v; return c }
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"empty": {nil, ErrNotIP}, "short v4": {v4[:19], ErrNotIP}, "short v6": {v6[:39], ErrNotIP},
		"version 5": {change(v4, 0, 0x55), ErrNotIP}, "ihl 4": {change(v4, 0, 0x44), ErrIPLength},
		"ihl beyond": {change(v4, 0, 0x46), ErrIPLength}, "long v4": {append(bytes.Clone(v4), 0), ErrIPLength},
		"v4 length": {change(v4, 3, 21), ErrIPLength}, "v6 length": {change(v6, 5, 1), ErrIPLength},
		"v4 said to be v6": {change(v4, 0, 0x65), ErrNotIP},
	} {
		if _, _, err := ParseIP(c.b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func FuzzReader(f *testing.F) {
	hello := AppendHello(nil, Hello{Version: Version})
	f.Add(hello)
	if c, err := AppendConfig(hello, Config{Address: netip.MustParsePrefix("10.80.0.2/32"), MTU: 1400}); err == nil {
		f.Add(c)
	}
	f.Add([]byte{2, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		n1, o1 := outcome(bytes.NewReader(b))
		n2, o2 := outcome(iotest.OneByteReader(bytes.NewReader(b)))
		if n1 != n2 || o1 != o2 {
			t.Fatalf("%d %s in one read, %d %s byte by byte", n1, o1, n2, o2)
		}
	})
}

func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"address":"10.80.0.2/32","mtu":1400,"dns":["10.1.0.53"]}`))
	f.Add([]byte(`{"state":"failed","detail":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := ParseConfig(b); err == nil {
			frame, err := AppendConfig(nil, c)
			if err != nil {
				t.Fatalf("parsed but does not encode: %v", err)
			}
			if again, err := ParseConfig(frame[headerSize:]); err != nil || !again.Equal(c) {
				t.Fatalf("%+v becomes %+v, %v", c, again, err)
			}
		}
		if s, err := ParseStatus(b); err == nil {
			if _, err := AppendStatus(nil, s); err != nil {
				t.Fatalf("parsed but does not encode: %v", err)
			}
		}
	})
}

func FuzzParseIP(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		if src, dst, err := ParseIP(b); err == nil && (!src.IsValid() || !dst.IsValid() || src.Is4() != dst.Is4()) {
			t.Fatalf("accepted with addresses %s, %s", src, dst)
		}
	})
}
