package policy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"sekisho/attest"
	"sekisho/attest/eventlog/logtest"
)

const org = "Test City"

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func bundle(version uint64, supersedes attest.Digest) *Bundle {
	return &Bundle{
		Profile: Profile, Organization: org, Version: version, Supersedes: supersedes,
		Rules: []Rule{{
			ID: "secure-boot", Fact: FactSecureBoot, Op: OpEqual, Values: []string{"on"},
			Why: attest.Text{JA: "必要です。", EN: "It is needed."},
		}},
		References: []Reference{{Values: logtest.Image{Kernel: "k"}.Reference("sekisho", "1")}},
	}
}

func sign(t testing.TB, b *Bundle, keys ...*ecdsa.PrivateKey) []byte {
	t.Helper()
	var data []byte
	for _, k := range keys {
		var err error
		if data, err = Sign(b, data, k); err != nil {
			t.Fatal(err)
		}
	}
	return data
}

func TestThreshold(t *testing.T) {
	a, b, c, stranger := newKey(t), newKey(t), newKey(t), newKey(t)
	ring, err := NewKeyring(2, &a.PublicKey, &b.PublicKey, &c.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	p := bundle(1, attest.Digest{})
	for _, x := range []struct {
		name string
		data []byte
		ok   bool
	}{
		{"two of three", sign(t, p, a, c), true},
		{"all", sign(t, p, a, b, c), true},
		{"two and a stranger", sign(t, p, stranger, a, b), true},
		{"one", sign(t, p, a), false},
		{"one and a stranger", sign(t, p, a, stranger), false},
		{"strangers", sign(t, p, stranger, newKey(t)), false},
	} {
		s, err := ring.Open(x.data)
		if (err == nil) != x.ok {
			t.Errorf("%s: %v", x.name, err)
		}
		if x.ok && !reflect.DeepEqual(s.Bundle, p) {
			t.Errorf("%s: %+v", x.name, s.Bundle)
		}
	}
	if _, err := Sign(p, sign(t, p, a), a); err == nil {
		t.Error("a key signed twice")
	}
	if _, err := NewKeyring(2, &a.PublicKey, &a.PublicKey); err == nil {
		t.Error("one key counted twice")
	}
	if _, err := NewKeyring(0, &a.PublicKey); err == nil {
		t.Error("threshold of none")
	}
}

// TestEveryByteIsSigned flips each byte of a bundle that just meets its
// threshold.
func TestEveryByteIsSigned(t *testing.T) {
	k := newKey(t)
	ring, err := NewKeyring(1, &k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	good := sign(t, bundle(1, attest.Digest{}), k)
	if _, err := ring.Open(good); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1
		if _, err := ring.Open(bad); err == nil {
			t.Fatalf("byte %d of %d is not signed", i, len(good))
		}
	}
}

func TestChain(t *testing.T) {
	k := newKey(t)
	open := func(b *Bundle) *Signed {
		s, err := Read(sign(t, b, k))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	now := time.Unix(1000, 0)
	one := open(bundle(1, attest.Digest{}))
	next := bundle(2, one.ID.Digest)
	next.NotBefore = 2000
	two := open(next)
	var c Chain
	if c.InForce(now, false, 0) != nil {
		t.Error("an empty chain has a policy in force")
	}
	if err := c.Append("Other City", one); err == nil {
		t.Error("policy of another organisation")
	}
	for _, s := range []*Signed{one, two} {
		if err := c.Append(org, s); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range map[string]*Bundle{
		"the first again": bundle(1, attest.Digest{}), "a fork": bundle(3, one.ID.Digest), "too early": bundle(3, two.ID.Digest),
	} {
		if err := c.Append(org, open(b)); err == nil {
			t.Error(name)
		}
	}
	if s := c.InForce(now, false, 0); s != one {
		t.Error("the old version is not in force before the new one's time")
	}
	if s := c.InForce(now.Add(time.Hour), false, 0); s != two {
		t.Error("the new version is not in force")
	}
	if s := c.InForce(now.Add(time.Hour), true, 1); s != one {
		t.Error("the new version came into force while held")
	}
}

// TestOldAndNewAreValidInBetween is the update that locks nobody out.
func TestOldAndNewAreValidInBetween(t *testing.T) {
	b := bundle(1, attest.Digest{})
	b.References[0].Until = 2000
	b.References = append(b.References, Reference{Values: logtest.Image{Kernel: "new"}.Reference("sekisho", "2")})
	for at, want := range map[int64]int{1999: 2, 2000: 1} {
		if got := len(b.Accepted(time.Unix(at, 0))); got != want {
			t.Errorf("at %d: %d images, want %d", at, got, want)
		}
	}
}

func TestEvaluate(t *testing.T) {
	why := attest.Text{JA: "理由", EN: "reason"}
	facts := Facts{
		FactSecureBoot: {"on"}, FactTPMFirmware: {"7.2.1.0"}, FactDBX: {"aa", "BB"}, FactPCR(0): {"00ff"},
	}
	for _, c := range []struct {
		rule Rule
		met  bool
	}{
		{Rule{Fact: FactSecureBoot, Op: OpEqual, Values: []string{"on"}}, true},
		{Rule{Fact: FactSecureBoot, Op: OpEqual, Values: []string{"off"}}, false},
		{Rule{Fact: FactPCR(0), Op: OpIn, Values: []string{"1", "00ff"}}, true},
		{Rule{Fact: FactPCR(0), Op: OpIn, Values: []string{"1"}}, false},
		{Rule{Fact: FactTPMFirmware, Op: OpMinimum, Values: []string{"7.2"}}, true},
		{Rule{Fact: FactTPMFirmware, Op: OpMinimum, Values: []string{"7.10"}}, false},
		{Rule{Fact: FactDBX, Op: OpContains, Values: []string{"bb", "AA"}}, true},
		{Rule{Fact: FactDBX, Op: OpContains, Values: []string{"cc", "aa"}}, false},
		// Unknown is never met.
		{Rule{Fact: FactImage, Op: OpIn, Values: []string{"unknown", ""}}, false},
		{Rule{Fact: FactDevices, Op: OpMinimum, Values: []string{"0"}}, false},
	} {
		c.rule.ID, c.rule.Why, c.rule.Severity = "r", why, attest.SeverityDegrade
		if err := c.rule.validate(); err != nil {
			t.Errorf("%+v: %v", c.rule, err)
		}
		f := Evaluate([]Rule{c.rule}, facts)
		if (len(f) == 0) != c.met {
			t.Errorf("%s %s %v: %v", c.rule.Fact, c.rule.Op, c.rule.Values, f)
		}
		if len(f) == 1 && (f[0].Sentence != why || f[0].Action.EN == "" || f[0].Expected == "" || f[0].Seen == "") {
			t.Errorf("finding without words: %+v", f[0])
		}
	}
}

// TestManyFindings: a result stays small, and what is worst stays in it.
func TestManyFindings(t *testing.T) {
	var rules []Rule
	for i := range maxRules {
		r := Rule{ID: strconv.Itoa(i), Fact: FactImage, Op: OpEqual, Values: []string{"x"}, Severity: attest.SeverityWarn}
		if i == maxRules-1 {
			r.Severity = attest.SeverityBlock
		}
		rules = append(rules, r)
	}
	list := Evaluate(rules, nil)
	if len(list) != maxFindings || Worst(list) != attest.StatusContraindicated {
		t.Errorf("%d findings, %v", len(list), Worst(list))
	}
}

func TestWorst(t *testing.T) {
	f := func(s ...attest.Severity) (list []attest.Finding) {
		for _, v := range s {
			list = append(list, attest.Finding{Severity: v})
		}
		return list
	}
	for _, c := range []struct {
		list []attest.Finding
		want attest.Status
	}{
		{nil, attest.StatusAffirming},
		{f(attest.SeverityWarn), attest.StatusAffirming},
		{f(attest.SeverityWarn, attest.SeverityDegrade), attest.StatusWarning},
		{f(attest.SeverityBlock, attest.SeverityDegrade), attest.StatusContraindicated},
		{f(attest.Severity(9)), attest.StatusContraindicated},
	} {
		if got := Worst(c.list); got != c.want {
			t.Errorf("%v: %v, want %v", c.list, got, c.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good, err := json.Marshal(bundle(1, attest.Digest{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"unknown field":     {`"version":1`, `"version":1,"x":1`},
		"version 0":         {`"version":1`, `"version":0`},
		"no organisation":   {org, ""},
		"other profile":     {Profile, "urn:other"},
		"unknown fact":      {`"fact":"secure-boot"`, `"fact":"weather"`},
		"wrong operation":   {`"op":"equal"`, `"op":"minimum"`},
		"unknown operation": {`"op":"equal"`, `"op":"like"`},
		"unknown severity":  {`"severity":"block"`, `"severity":"maybe"`},
		"one language":      {"必要です。", ""},
		"long text":         {"必要です。", strings.Repeat("長", 200)},
		"no values":         {`["on"]`, `[]`},
		"image without PCR": {`"11":`, `"10":`},
		"two documents":     {`{"profile"`, `{} {"profile"`},
	} {
		bad := strings.Replace(string(good), change[0], change[1], 1)
		if bad == string(good) {
			t.Errorf("%s: nothing changed", name)
		} else if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := newKey(f)
	ring, err := NewKeyring(1, &k.PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	good := sign(f, bundle(1, attest.Digest{}), k)
	f.Add(good)
	f.Add([]byte{0xd8, 0x62, 0x84})
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ring.Open(data)
		if err == nil && s.ID.Digest == (attest.Digest{}) {
			t.Error("a bundle without a name")
		}
		if s, err := Read(data); err == nil {
			if _, err := s.Bundle.Encode(); err != nil {
				t.Error(err)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	good, err := json.Marshal(bundle(1, attest.Digest{}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse(data)
		if err != nil {
			return
		}
		enc, err := b.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(enc); err != nil {
			t.Error(err)
		}
		Evaluate(b.Rules, Facts{FactImage: {"x"}})
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"))
	der, err := x509.MarshalPKIXPublicKey(&newKey(f).PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if k, err := ParseKey(data); err == nil && k.Curve != elliptic.P256() {
			t.Error("a key of another curve")
		}
	})
}
