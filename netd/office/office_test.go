package office

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/cryptrec"
)

// channel returns both ends' states of one TLS connection whose server has a
// certificate for site and key.
func channel(t *testing.T, site string) (client, server tls.ConnectionState, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(attest.SiteURI(site))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"beacon"}, URIs: []*url.URL{uri}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	sc, cc := cryptrec.Config(), cryptrec.Config()
	sc.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	cc.RootCAs, cc.ServerName = x509.NewCertPool(), "beacon"
	cc.RootCAs.AddCert(leaf)
	s, c := tls.Server(b, sc), tls.Client(a, cc)
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	if err := errors.Join(c.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState(), s.ConnectionState(), key
}

// TestVerify has one case for each thing that a nil error of Verify proves.
func TestVerify(t *testing.T) {
	client, server, key := channel(t, "hq")
	elsewhere, _, _ := channel(t, "hq")
	q := Question{
		Nonce: []byte(strings.Repeat("n", NonceSize)), Hardware: "02:00:00:00:00:01",
		Laptop: netip.MustParseAddrPort("10.20.0.50:40000"), Beacon: netip.MustParseAddrPort("10.20.0.9:8443"),
	}
	good := Statement{
		Site: "hq", Nonce: q.Nonce, Laptop: q.Laptop, LaptopHardware: q.Hardware, Beacon: q.Beacon, BeaconHardware: "02:00:00:00:00:09",
		Networks: []netip.Prefix{netip.MustParsePrefix("10.20.0.0/16")}, Life: 2000,
	}
	for name, c := range map[string]struct {
		change func(*Statement)
		answer func(*Answer)
		state  tls.ConnectionState
		site   string
		ok     bool
	}{
		"good":                   {ok: true},
		"another site":           {site: "branch"},
		"another site stated":    {change: func(s *Statement) { s.Site = "branch" }},
		"another nonce":          {change: func(s *Statement) { s.Nonce = []byte("old") }},
		"seen elsewhere":         {change: func(s *Statement) { s.Laptop = netip.MustParseAddrPort("10.20.0.51:40000") }},
		"seen at another port":   {change: func(s *Statement) { s.Laptop = netip.MustParseAddrPort("10.20.0.50:40001") }},
		"other hardware":         {change: func(s *Statement) { s.LaptopHardware = "02:00:00:00:00:02" }},
		"beacon elsewhere":       {change: func(s *Statement) { s.Beacon = netip.MustParseAddrPort("10.20.0.8:8443") }},
		"beacon's other face":    {change: func(s *Statement) { s.BeaconHardware = "02:00:00:00:00:08" }},
		"for ever":               {change: func(s *Statement) { s.Life = 1 << 30 }},
		"for no time":            {change: func(s *Statement) { s.Life = 0 }},
		"everything":             {change: func(s *Statement) { s.Networks[0] = netip.MustParsePrefix("0.0.0.0/0") }},
		"half of everything":     {change: func(s *Statement) { s.Networks[0] = netip.MustParsePrefix("128.0.0.0/1") }},
		"link-local":             {change: func(s *Statement) { s.Networks[0] = netip.MustParsePrefix("169.254.0.0/16") }},
		"itself":                 {change: func(s *Statement) { s.Networks[0] = netip.MustParsePrefix("127.0.0.0/8") }},
		"too many networks":      {change: func(s *Statement) { s.Networks = make([]netip.Prefix, maxNetworks+1) }},
		"another connection":     {state: elsewhere},
		"no certificate":         {state: tls.ConnectionState{Version: tls.VersionTLS13}},
		"changed on the way":     {answer: func(a *Answer) { a.Statement = append(a.Statement, ' ') }},
		"unsigned":               {answer: func(a *Answer) { a.Signature = nil }},
		"a refusal":              {answer: func(a *Answer) { a.Refused = "not today" }},
		"a refusal and an empty": {answer: func(a *Answer) { *a = Answer{Refused: "no"} }},
	} {
		t.Run(name, func(t *testing.T) {
			s := good
			s.Networks = append([]netip.Prefix(nil), good.Networks...)
			if c.change != nil {
				c.change(&s)
			}
			a, err := sign(s, server, key)
			if err != nil {
				t.Fatal(err)
			}
			if c.answer != nil {
				c.answer(&a)
			}
			state, site := client, "hq"
			if c.state.Version != 0 {
				state = c.state
			}
			if c.site != "" {
				site = c.site
			}
			_, err = Verify(a, q, state, site, "02:00:00:00:00:09")
			if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrRefused) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestMessagesAreBounded(t *testing.T) {
	in := lines{r: strings.NewReader(strings.Repeat("x", maxMessage*2))}
	if err := in.read(new(Question)); err == nil {
		t.Error("a message without an end was read")
	}
	in = lines{r: strings.NewReader("{\"site\":\"a\"}\n{\"site\":\"b\"}\n")}
	var a, b Statement
	if err := errors.Join(in.read(&a), in.read(&b)); err != nil || a.Site != "a" || b.Site != "b" {
		t.Errorf("%v %v, %v", a, b, err)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add([]byte("{\"nonce\":\"AAAA\",\"laptop\":\"10.0.0.1:1\"}\n"))
	f.Add([]byte("{\"statement\":\"e30=\",\"signature\":\"AA==\"}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := lines{r: strings.NewReader(string(data))}
		for {
			var q Question
			if in.read(&q) != nil {
				break
			}
		}
		var a Answer
		(&lines{r: strings.NewReader(string(data))}).read(&a)
		Verify(a, Question{}, tls.ConnectionState{}, "hq", "")
	})
}

func FuzzBeaconConfig(f *testing.F) {
	f.Add([]byte(`{"site":"hq","interface":"eth0","listen":"10.20.0.9:8443","certificate":"c","key":"k","client_ca":"a","networks":["10.20.0.0/16"]}`))
	f.Fuzz(func(t *testing.T, data []byte) { ParseBeaconConfig(data) })
}
