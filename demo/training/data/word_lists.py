"""Plain word lists that synthetic names and facts draw from."""


def listed(text: str) -> list[str]:
    """Return the comma-separated entries of a text."""
    return [" ".join(entry.split()) for entry in text.split(",")]


ONSETS = listed("b,br,c,ch,cl,d,dr,f,g,gr,h,j,k,kr,l,m,n,p,pr,qu,r,s,sh,st,t,th,tr,v,w,y,z,zh")
VOWELS = listed("a,e,i,o,u,a,e,i,o,ai,ea,ou,ee,uu")
CODAS = listed(",,n,r,l,s,m,nd,rn,x,k,th,ll")
TOWN_ENDS = listed("ton,ville,burg,ford,holm,mouth,by,stad,grad,port,field,dale,pur,abad,haven,wick")

LISTS: dict[str, list[str]] = {
    "first": listed(
        """James, Mary, John, Anna, Robert, Linda, Peter, Sarah, David, Elena, Karl, Ingrid, Omar, Fatima,
        Wei, Yuki, Carlos, Lucia, Ivan, Olga, Ahmed, Leila, Paul, Grace, Henry, Alice, Tomas, Nadia,
        Samuel, Ruth, Victor, Clara, Hugo, Irene, Felix, Dora, Martin, Julia, Oscar, Rosa, Louis, Marie,
        Pierre, Giovanni, Ernst, Max, Niels, Otto, Erik, Hans"""
    ),
    "last": listed(
        """Smith, Brown, Keller, Novak, Tanaka, Silva, Jensen, Okafor, Haddad, Petrov, Moreau, Rossi,
        Lindgren, Walsh, Fischer, Kowalski, Chen, Gupta, Adeyemi, Costa, Murphy, Hansen, Weber, Romero,
        Lang, Becker, Stone, Hill"""
    ),
    "city": listed(
        """Paris, London, Berlin, Madrid, Rome, Vienna, Oslo, Cairo, Lima, Quito, Boston, Denver, Chicago,
        Toronto, Sydney, Delhi, Mumbai, Tokyo, Osaka, Seoul, Prague, Lisbon, Dublin, Athens, Warsaw,
        Nairobi, Lagos, Geneva, Hamburg, Munich, Lyon, Turin, Leeds, Austin, Dallas, Seattle, Florence,
        Venice, Basel, Kyoto, Bergen"""
    ),
    "real_country": listed(
        """France, Germany, Spain, Italy, Norway, Sweden, Egypt, Peru, Brazil, Chile, Canada, Japan, India,
        China, Kenya, Nigeria, Poland, Portugal, Greece, Ireland, Mexico, Turkey, Iran, Vietnam, Finland,
        Austria, Hungary, Cuba, Ghana, Nepal, Russia, England, Scotland, Australia, Argentina"""
    ),
    "continent": listed(
        """Africa, Asia, Europe, South America, North America, Oceania, Central Asia, West Africa, East
        Africa, South-East Asia, the Balkans, the Caribbean, the Middle East, Western Europe"""
    ),
    "month": listed(
        """January, February, March, April, May, June, July, August, September, October, November, December"""
    ),
    "number_word": listed(
        """two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
        sixteen, eighteen, twenty, thirty, forty, fifty, sixty"""
    ),
    "occupation": listed(
        """physicist, painter, novelist, composer, engineer, botanist, architect, chemist, lawyer, surgeon,
        poet, historian, astronomer, journalist, mathematician, sculptor, economist, politician,
        violinist, geologist, playwright, philosopher, explorer, inventor, physician, biologist,
        clockmaker, priest, mining engineer, naturalist, film director"""
    ),
    "demonym": listed(
        """French, German, Spanish, Italian, Norwegian, Swedish, Egyptian, Peruvian, Brazilian, English,
        Scottish, Irish, Russian, Polish, Dutch, Danish, American, Hungarian, Austrian, Swiss, Indian,
        Chinese, Japanese, Greek, Turkish, Persian"""
    ),
    "field": listed(
        """genetics, optics, mathematics, economics, medicine, philosophy, music theory, organic chemistry,
        linguistics, astronomy, civil engineering, computer science, law, botany, geometry, physics,
        chemistry, literature"""
    ),
    "product": listed(
        """bicycles, tractors, microscopes, solar panels, cameras, steel pipes, pianos, medical software,
        electric motors, ceramic tiles, batteries, aircraft engines, sewing machines, video games, fishing
        boats, coffee machines, wine, coffee, copper, diamonds, cocoa, tea, cotton, oil and gas, bananas,
        watches, olive oil"""
    ),
    "food": listed(
        """insects, small fish, seeds, bamboo shoots, fruit and nectar, earthworms, leaves, crabs, moss,
        algae, berries, small rodents, grass, eucalyptus leaves, krill, ants and termites, squid, acorns,
        snails, dead wood"""
    ),
    "habitat": listed(
        """mountain forests, mangrove swamps, dry grasslands, coral reefs, river deltas, coastal dunes,
        tropical rainforests, deserts, alpine meadows, limestone caves, open savanna, slow rivers, salt
        lakes, the Arctic tundra, pine woods, bamboo forests"""
    ),
    "group_word": listed(
        """herd, pack, pride, colony, flock, school, troop, pod, swarm, parliament, clan, tower, band, army"""
    ),
    "colour": listed(
        """red, blue, green, silver, golden, pale yellow, black, white, dark purple, orange, grey, silvery
        white, reddish brown, violet, pink"""
    ),
    "genre": listed(
        """historical novel, science fiction novel, collection of poems, travel book, tragedy, comedy,
        detective novel, memoir, satire, symphony, opera, ballet, oil painting, fresco, epic poem, silent
        film, string quartet, play"""
    ),
    "style": listed(
        """Gothic, Baroque, Art Deco, modernist, neoclassical, Romanesque, Victorian, Byzantine, Renaissance,
        Brutalist, Ottoman"""
    ),
    "material": listed(
        """granite, marble, red brick, sandstone, limestone, steel and glass, oak timber, concrete, wrought
        iron, copper, bronze, silk, bamboo, clay, volcanic rock, white marble, reinforced concrete"""
    ),
    "use": listed(
        """making glass, cooling engines, treating infections, dyeing cloth, building bridges, measuring
        temperature, cleaning water, storing grain, cutting stone, navigation at sea, batteries,
        jewellery, weather balloons, light bulbs, nuclear reactors, dental fillings, fertiliser,
        fireworks, printing books, weaving"""
    ),
    "class_word": listed(
        """mammal, bird, fish, reptile, insect, amphibian, rodent, whale, cat, bear, monkey, lizard, shark,
        beetle, snake, seabird, parrot"""
    ),
    "metal_class": listed(
        """noble gas, transition metal, alkali metal, halogen, metalloid, rare earth metal, soft metal, heavy
        metal, colourless gas, non-metal, radioactive metal"""
    ),
    "instrument": listed("violin, piano, flute, guitar, cello, trumpet, drum, organ, harp, lute"),
    "adjective": listed(
        """small, large, old, bright, heavy, wild, royal, narrow, deep, early, dry, common, modern, sweet,
        public, rare, native, simple, hot, cold, dark, light, hollow, broken"""
    ),
    "title_adjective": listed(
        """Silent, Broken, Golden, Last, Hidden, Crimson, Distant, Burning, Frozen, Lost, Wandering, Second"""
    ),
    "title_noun": listed(
        """River, Garden, Mirror, Harbour, Letter, Crown, Winter, Orchard, Clock, Island, Shadow, Bridge,
        Lantern, Road, Night, Tower, King, Sea, House, War"""
    ),
    "cause": listed(
        """heavy rain, a dispute over taxes, an earthquake, a shortage of grain, a broken dam, a faulty
        engine, the death of the king, rising fuel prices, a lightning strike, a failed harvest, a long
        drought"""
    ),
    "thing": listed(
        """boat, castle, inn, bridge, rock, island, valley, theatre, school, bell, bear, dog, fish, tree, flower, gate,
        village, library, crater, tower, lake, glacier, house, horse, star, comet, engine, statue, temple, market,
        tomb, hill, palace, street, garden, hotel, canal, fox, swan, giant, cave"""
    ),
}
